"""An image on standard input or output.

Whoever is at the other end of a pipe may take its time, or stand still. The wait for it can be cancelled: a read begins
when there is something to read, and a pipe is written through a descriptor of its own that does not block.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NoReturn

import trio

from pipeline.errors import StorageError, UsageError
from pipeline.transport.files import FileSink, FileSource, said
from pipeline.transport.framing import ByteSink, ByteSource


class _StreamSource(FileSource):
    """What may have to be waited for: the wait can be cancelled, which a thread that reads cannot."""

    async def read_into(self, view: memoryview) -> int:
        with suppress(PermissionError):  # a file on a disk: always readable
            await trio.lowlevel.wait_readable(self.fd)
        return await super().read_into(view)


class _PipeSink:
    """A pipe that may be full for long: the wait can be cancelled."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self._name = name

    async def write(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                await trio.lowlevel.checkpoint()
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._fd)
                except OSError as error:
                    raise StorageError(f"{self._name}: {said(error)}") from error


def _without_blocking(fd: int) -> int | None:
    """The pipe behind `fd`, opened once more and without blocking; None for anything else.

    O_NONBLOCK on `fd` itself would be seen by everybody who shares it.
    """
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None  # made by another user


class StreamStorage:
    """Standard output or input."""

    has_manifest = False
    reads_at_once = 1
    remains = ()
    name = "standard stream"

    async def require_free(self) -> None:
        """A terminal is no place for an image."""
        if sys.stdout.isatty():
            raise UsageError("standard output is a terminal; redirect it to a file or a pipe")

    @asynccontextmanager
    async def claimed(self) -> AsyncIterator[None]:
        """Nobody else knows of it."""
        yield

    @asynccontextmanager
    async def create(self, name: str, room_bytes: int = 0) -> AsyncIterator[ByteSink]:
        """See `Storage.create`."""
        fd = _without_blocking(1)
        if fd is None:
            yield FileSink(1, "standard output")
            return
        try:
            yield _PipeSink(fd, "standard output")
        finally:
            os.close(fd)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[ByteSource]:
        """See `Storage.open`."""
        yield _StreamSource(0, "standard input")

    def open_ranges(self, name: str) -> NoReturn:
        """See `Storage.open_ranges`."""
        raise UsageError(
            "--lazy reads pages in any order: it needs an image in a directory or in an object store"
        )

    async def discard(self, name: str) -> None:
        """What was written to a stream cannot be taken back; without its end record it is no image."""
