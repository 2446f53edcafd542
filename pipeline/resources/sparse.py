"""Copying files that have holes: the holes stay holes.

Preallocated space that was never written (fallocate(2)) reads as a hole, and becomes one.

Source: lseek(2) SEEK_DATA, SEEK_HOLE.
"""

from __future__ import annotations

import errno
import os

from pipeline.ids import LocalFd

_CHUNK_BYTES = 8 << 20


def copy(source: LocalFd, target: int, size_bytes: int) -> None:
    """Copy the data of a file; its holes stay holes."""
    os.ftruncate(target, size_bytes)
    at = 0
    while at < size_bytes:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = min(os.lseek(source, at, os.SEEK_HOLE), size_bytes)
        while at < end:
            piece = os.pread(source, min(_CHUNK_BYTES, end - at), at)
            if not piece:
                return
            at += os.pwrite(target, piece, at)
