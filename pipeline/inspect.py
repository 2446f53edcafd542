"""Inspecting: what an image holds, without rebuilding any of it.

The whole image is read, every checksum is verified and every reference followed, so an
image that can be inspected is also complete; its index is read, too, and is that of this
image. Page contents are counted and dropped.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.errors import ImageError
from pipeline.image.codec import Image
from pipeline.image.schema import End, Layer
from pipeline.kernel.pagemap import total_bytes
from pipeline.restore import PageRuns, opened, opened_object, read_records
from pipeline.stages.stored_pages import layer_index, needed, stored_index
from pipeline.transport.buffers import LeasedRun
from pipeline.transport.index import Index
from pipeline.transport.manifest import read_manifest
from pipeline.transport.storage import Storage, open_storage, referred
from pipeline.userns.portrait import Portrait, Sitter, paint


@dataclass(frozen=True, slots=True)
class Inspection:
    """A complete image.

    Args:
        image: its records.
        page_bytes: how many bytes of pages it carries for each space.
        image_bytes: its size, that of its own layer counted.
        index_bytes: the size of its index; 0 if it was made without one.
    """

    image: Image
    page_bytes: dict[int, int]
    image_bytes: int
    index_bytes: int = 0

    def portrait(self) -> Portrait:
        """Its namespaces, and who lives where."""
        sitters = []
        for process in self.image.processes.values():
            first = process.threads[0] if process.threads else None
            sitters.append(
                Sitter(
                    process.pids,
                    (first.comm if first else process.comm).decode(errors="backslashreplace"),
                    process.namespaces,
                    first.credentials if first else process.credentials,
                )
            )
        return paint(self.image.user_namespaces.values(), self.image.namespaces.values(), sitters)


async def inspect(source: str) -> Inspection:
    """Read the image at `source`.

    Args:
        source: a directory, a URL, or ``-``.

    Raises:
        ImageError: there is none, it is damaged, not complete, or too new.
        StorageError: the place it is in failed.
    """
    page_bytes: Counter[int] = Counter()
    storage = open_storage(source)
    manifest = await read_manifest(storage)
    index_bytes = manifest.index_bytes if manifest is not None else 0
    async with opened(storage) as reader:
        image, first = await read_records(reader)
        if first is not None:
            _count(first, page_bytes)
        async for leased in PageRuns(reader, image, first):
            _count(leased, page_bytes)
        if index_bytes and (await stored_index(storage, index_bytes))[0].end != image.end:
            raise ImageError(f"{storage.name}: the index is that of another image")
        size = reader.bytes_read
    for layer in image.layers.values():
        found = await _read_layer(storage, layer)
        if not layer.at:
            size, index_bytes = size + found.image_bytes, index_bytes + found.index_bytes
    for stored in image.stored.values():
        page_bytes[stored.space] += total_bytes(stored.runs)
    return Inspection(image, dict(page_bytes), size, index_bytes)


async def _read_layer(storage: Storage, layer: Layer) -> Index:
    """Verify a layer; its index."""
    if not storage.has_manifest:
        raise ImageError(
            f"{storage.name}: this is a part of an image: pages of it are in {layer.name!r} beside it"
        )
    place = referred(storage, layer.at)
    with needed(storage, layer):
        index = await layer_index(storage, layer)
        async with opened_object(place, layer.name) as reader:
            while (item := await reader.next()) is not None:
                if isinstance(item, LeasedRun):
                    item.lease.release()
                elif isinstance(item, End) and item == index.end:
                    return index
        raise ImageError(f"{place.name}/{layer.name}: this is not the layer that the image was made with")


def _count(leased: LeasedRun, page_bytes: Counter[int]) -> None:
    page_bytes[leased.run.space] += len(leased.run.payload)
    leased.lease.release()
