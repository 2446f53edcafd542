"""The manifest: what stands beside an image, and says that it is complete."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from pipeline.errors import ImageError
from pipeline.image.schema import FORMAT_VERSION
from pipeline.transport.storage import MANIFEST, Storage


class Manifest(Struct, frozen=True):
    """What stands beside a complete image. `index_bytes`: 0 where there is no index."""

    format: int
    image_bytes: int
    page_bytes: int
    index_bytes: int = 0


async def write_manifest(storage: Storage, manifest: Manifest) -> None:
    """Say that the image in `storage` is complete; a stream has no place for that."""
    if storage.has_manifest:
        async with storage.create(MANIFEST) as sink:
            await sink.write(msgspec.json.encode(manifest))


async def read_manifest(storage: Storage) -> Manifest | None:
    """What stands beside the complete image in `storage`; None for a stream, which has none.

    Raises:
        ImageError: there is no image, it is not complete, or it is too new.
    """
    if not storage.has_manifest:
        return None
    raw = bytearray(1 << 16)
    async with storage.open(MANIFEST) as source:
        size = await source.read_into(memoryview(raw))
    try:
        manifest = msgspec.json.decode(bytes(raw[:size]), type=Manifest)
    except msgspec.DecodeError as error:
        raise ImageError(f"the manifest is damaged: {error}") from None
    if manifest.format > FORMAT_VERSION:
        raise ImageError(f"the image has format {manifest.format}; this version reads up to {FORMAT_VERSION}")
    return manifest
