"""Where images are kept: a directory, an object store, or a stream; one interface.

An image is one object of frames, ``image``, and a small ``manifest`` that is written
when all of it is safe: an image is there whole, or not at all. Nothing is kept in
memory or on the local disk on the way to an object store.

* Directory, ``file://``: files of mode 0600, written under a temporary name, synced,
  renamed; then the directory is synced.
* ``s3://bucket/prefix`` (and what else obstore knows): a multipart upload, given up
  when writing fails. Endpoint and credentials come from the usual AWS_* variables.
* ``-``: standard input or output; the stream's own end record takes the manifest's place.

Source: rename(2), fsync(2).
"""

from __future__ import annotations

import os
import queue
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import trio

from pipeline.errors import ImageError, StorageError, UsageError
from pipeline.ledger import LEDGER
from pipeline.transport.files import FileSink, FileSource, said
from pipeline.transport.framing import ByteSink, ByteSource
from pipeline.transport.stream import StreamStorage

IMAGE = "image"
MANIFEST = "manifest"
_PART_BYTES = 8 << 20


class Storage(Protocol):
    """A place for one image."""

    #: what messages call it
    name: str
    #: whether it keeps a manifest beside the image
    has_manifest: bool

    async def require_free(self) -> None:
        """Raise UsageError if there is an image already."""

    def create(self, name: str) -> AbstractAsyncContextManager[ByteSink]:
        """Write an object; it exists when the block ends well, and not at all otherwise."""

    def open(self, name: str) -> AbstractAsyncContextManager[ByteSource]:
        """Read an object; ImageError if there is none."""

    async def discard(self, name: str) -> None:
        """Remove an object, if it is there."""


def open_storage(url: str) -> Storage:
    """The storage that `url` names: a directory, ``file://``, ``s3://bucket/prefix`` or ``-``.

    Raises:
        UsageError: it names nothing that is known.
    """
    if url == "-":
        return StreamStorage()
    scheme, separator, _ = url.partition("://")
    if not separator:
        return DirectoryStorage(Path(url))
    if scheme == "file":
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise UsageError(f"{url}: a file:// address names a path of this host, like file:///var/images/1")
        return DirectoryStorage(Path(unquote(parts.path)))
    if scheme in ("s3", "s3a", "gs", "az"):
        return ObjectStorage(url)
    raise UsageError(f"{url}: not a directory, file://, s3://bucket/prefix or - (standard output)")


# -- directory --------------------------------------------------------------------------


class DirectoryStorage:
    """A directory that holds one image."""

    has_manifest = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        #: where it is, for who comes from another directory
        self.place = str(path.absolute())

    async def require_free(self) -> None:
        """See `Storage.require_free`; makes nothing."""
        try:
            there = set(os.listdir(self._path))
        except FileNotFoundError:
            there = set()
        except NotADirectoryError:
            raise UsageError(f"{self.name} is not a directory; give --to a new one") from None
        except OSError as error:
            raise UsageError(f"{self.name}: {said(error)}") from None
        if there & {MANIFEST, IMAGE}:
            raise UsageError(f"{self.name} holds an image already; give --to a new directory, or remove it")
        if there:
            raise UsageError(f"{self.name} is not empty; give --to a new directory, or empty it")
        above = _nearest_there(self._path)
        if not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"{self.name}: no file can be made in {above}; give --to another place")

    @asynccontextmanager
    async def create(self, name: str) -> AsyncIterator[ByteSink]:
        """See `Storage.create`."""
        made = not self._path.exists()
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._path / f".{name}.{os.getpid()}.partial"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.name}: {said(error)}") from error
        LEDGER.take("partial file", temporary)
        try:
            yield FileSink(fd, str(self._path / name))
            try:
                await trio.to_thread.run_sync(os.fsync, fd)
                os.rename(temporary, self._path / name)
                _sync_directory(self._path)
            except OSError as error:
                raise StorageError(f"{self._path / name}: {said(error)}") from error
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                temporary.unlink()
            if made:
                with suppress(OSError):
                    self._path.rmdir()  # only succeeds if nothing came into being
            LEDGER.give_back("partial file", temporary)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[ByteSource]:
        """See `Storage.open`."""
        path = self._path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            if name == MANIFEST and (self._path / IMAGE).exists():
                raise ImageError(f"{self.name}: the image is not complete (it has no manifest)") from None
            raise ImageError(f"{self.name}: there is no image here") from None
        except NotADirectoryError:
            raise ImageError(f"{self.name}: an image is a directory, and this is none") from None
        except OSError as error:
            raise StorageError(f"{path}: {said(error)}") from error
        try:
            yield FileSource(fd, str(path))
        finally:
            os.close(fd)

    async def discard(self, name: str) -> None:
        """See `Storage.discard`."""
        with suppress(OSError):
            (self._path / name).unlink()


def _nearest_there(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next(at for at in (path, *path.absolute().parents) if os.path.lexists(at))


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- object store --------------------------------------------------------------------------


class _GiveUp(Exception):
    """Ends an upload that must not become an object."""


def _brief(error: BaseException) -> str:
    """What obstore says, without the dump of its own state that follows."""
    return str(error).partition("\n\nDebug source:")[0].strip()


class _UploadSink:
    """Hands parts to the thread that uploads; holds two parts at the most."""

    def __init__(self) -> None:
        self.parts: queue.Queue[bytes | _GiveUp | None] = queue.Queue(maxsize=2)
        self._part = bytearray()
        self.failed: list[BaseException] = []

    async def write(self, *buffers: bytes | memoryview) -> None:
        for buffer in buffers:
            view = memoryview(buffer)
            while view:
                room = _PART_BYTES - len(self._part)
                self._part += view[:room]
                view = view[room:]
                if len(self._part) == _PART_BYTES:
                    await self._push(bytes(self._part))
                    self._part.clear()

    async def _push(self, part: bytes | _GiveUp | None) -> None:
        while not self.failed:
            with suppress(queue.Full):
                self.parts.put_nowait(part)
                return
            await trio.sleep(0.002)
        raise StorageError(f"upload: {_brief(self.failed[0])}")

    async def finish(self) -> None:
        if self._part:
            await self._push(bytes(self._part))
        await self._push(None)

    def iterate(self) -> Iterator[bytes]:
        while (part := self.parts.get()) is not None:
            if isinstance(part, _GiveUp):
                raise part
            yield part


class _DownloadSource:
    def __init__(self, chunks: Iterator[Any], name: str) -> None:
        self._chunks = chunks
        self._name = name
        self._rest = memoryview(b"")

    async def read_into(self, view: memoryview) -> int:
        if not self._rest:
            try:
                chunk = await trio.to_thread.run_sync(next, self._chunks, None)
            except Exception as error:
                raise StorageError(f"{self._name}: {_brief(error)}") from error
            if chunk is None:
                return 0
            self._rest = memoryview(bytes(chunk))
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


class ObjectStorage:
    """A prefix in an object store, by obstore; its blocking interface runs in worker threads."""

    has_manifest = True

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        scheme, _, rest = self.name.partition("://")
        bucket, _, self._prefix = rest.partition("/")
        if not bucket:
            raise UsageError(f"{url}: names no bucket; write it like s3://bucket/prefix")
        self._bucket_url = f"{scheme}://{bucket}"
        self._made: Any = None

    def _store(self) -> Any:
        if self._made is None:
            from obstore.store import from_url

            endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
            plain = {"client_options": {"allow_http": True}} if endpoint.startswith("http://") else {}
            try:
                self._made = from_url(self._bucket_url, **plain)  # type: ignore[call-overload]
            except Exception as error:
                raise StorageError(f"{self.name}: {_brief(error)}") from error
        return self._made

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    async def require_free(self) -> None:
        """See `Storage.require_free`."""
        import obstore

        def look() -> bool:
            try:
                obstore.head(self._store(), self._path(MANIFEST))
            except FileNotFoundError:
                return False
            return True

        try:
            taken = await trio.to_thread.run_sync(look)
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.name}: {_brief(error)}") from error
        if taken:
            raise UsageError(f"{self.name} holds an image already; give another prefix, or remove it")

    @asynccontextmanager
    async def create(self, name: str) -> AsyncIterator[ByteSink]:
        """See `Storage.create`."""
        import obstore

        sink = _UploadSink()
        path = self._path(name)

        def upload() -> None:
            try:
                obstore.put(self._store(), path, sink.iterate(), chunk_size=_PART_BYTES, use_multipart=True)
            except BaseException as error:  # noqa: BLE001 (said by whoever waits for the upload)
                sink.failed.append(error)

        lost: list[Exception] = []
        async with trio.open_nursery() as nursery:
            done = trio.Event()

            async def run() -> None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(upload)
                done.set()

            nursery.start_soon(run)
            try:
                yield sink
                await sink.finish()
            except Exception as error:  # noqa: BLE001 (raised below: a nursery would wrap it in a group)
                _give_up(sink)
                lost.append(error)
            except BaseException:
                _give_up(sink)
                raise
            with trio.CancelScope(shield=True):
                await done.wait()
        if lost:
            raise lost[0]
        if sink.failed:
            raise StorageError(f"{self.name}/{name}: {_brief(sink.failed[0])}")

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[ByteSource]:
        """See `Storage.open`."""
        import obstore

        try:
            result = await trio.to_thread.run_sync(obstore.get, self._store(), self._path(name))
        except FileNotFoundError:
            raise ImageError(f"{self.name}: there is no complete image here") from None
        except StorageError:
            raise
        except Exception as error:
            raise StorageError(f"{self.name}/{name}: {_brief(error)}") from error
        yield _DownloadSource(iter(result.stream(min_chunk_size=1 << 20)), f"{self.name}/{name}")

    async def discard(self, name: str) -> None:
        """See `Storage.discard`."""
        import obstore

        with suppress(FileNotFoundError):
            await trio.to_thread.run_sync(obstore.delete, self._store(), self._path(name))


def _give_up(sink: _UploadSink) -> None:
    while True:
        with suppress(queue.Full):
            sink.parts.put_nowait(_GiveUp("given up"))
            return
        with suppress(queue.Empty):
            sink.parts.get_nowait()
