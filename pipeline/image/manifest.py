"""What stands beside a complete image, where a storage keeps it: JSON, written last."""

from __future__ import annotations

from msgspec import Struct


class Manifest(Struct, frozen=True):
    """Format of the image, its size, how much of that is pages, and the size of its index (0: it has none)."""

    format: int
    image_bytes: int
    page_bytes: int
    index_bytes: int = 0
