"""What stands beside a complete image, where a storage keeps it: JSON, written last."""

from __future__ import annotations

from msgspec import Struct


class Manifest(Struct, frozen=True):
    """Format of the image, its size, and how much of that is pages."""

    format: int
    image_bytes: int
    page_bytes: int
