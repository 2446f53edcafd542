"""Where images are kept: a directory, an object store, or a stream; one interface.

An image is one object of frames, ``image``, its ``index``, which is written beside it,
and a small ``manifest`` that is written when all of it is safe: an image is there whole,
or not at all. Where its memory was stored while the tree ran, most of the pages are in a layer
beside it, ``pages``, with an index of its own.

* Directory, ``file://``: files of mode 0600, written under a temporary name, synced,
  renamed; the directory is synced before the manifest gets its name, and behind that.
* ``s3://bucket/prefix`` (and what else obstore knows): see `pipeline.transport.object_store`.
* ``-``: standard input or output; the stream's own end record takes the manifest's place, and
  there is no index.

Source: rename(2), fsync(2).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit

import trio

from pipeline.errors import ImageError, StorageError, UsageError, ungrouped
from pipeline.ids import LocalFd
from pipeline.ledger import LEDGER
from pipeline.leftovers import Unfinished, noted
from pipeline.transport.files import FileRanges, FileSource, LateFileSink, give_back_room, make_room, said
from pipeline.transport.framing import ByteSink, ByteSource
from pipeline.transport.stream import StreamStorage

IMAGE = "image"
INDEX = "index"
LAYER = "pages"
MANIFEST = "manifest"
#: is there while an image is written
CLAIM = "writing"


#: what a killed dump leaves in a directory
_UNFINISHED = Unfinished(CLAIM, [".*.partial", IMAGE, INDEX, LAYER, f"{LAYER}.{INDEX}"], MANIFEST)


def index_of(name: str) -> str:
    """What the index of an object of frames is called."""
    return INDEX if name == IMAGE else f"{name}.{INDEX}"


class RangeSource(Protocol):
    """An object that is read at any place."""

    #: what messages call it
    name: str
    size_bytes: int

    async def read_at(self, offset: int, view: memoryview) -> None:
        """Fill `view` with what is at `offset`; several may do so at once.

        Raises:
            ImageError: it is not any more what was opened: replaced, removed or shorter.
            StorageError: it cannot be read now, which may pass.
        """


class Storage(Protocol):
    """A place for one image."""

    #: what messages call it
    name: str
    #: whether it keeps a manifest and an index beside the image
    has_manifest: bool
    #: how many reads of a large object pay, at the same time
    reads_at_once: int

    @property
    def remains(self) -> Sequence[str]:
        """Names of objects that were to be removed and may be there all the same: it does not answer, or will not."""

    async def require_free(self) -> None:
        """Raise UsageError if there is an image already."""

    def claimed(self) -> AbstractAsyncContextManager[None]:
        """Let nobody else write an image here within the block: of two trees, one would be in none.

        Raises:
            UsageError: there is an image already, or somebody else is writing one.
        """

    def create(self, name: str, room_bytes: int = 0) -> AbstractAsyncContextManager[ByteSink]:
        """Write an object; it exists when the block ends well, and not at all otherwise. Within `claimed`.

        Args:
            room_bytes: about as much will be written; a place that can makes ready for it before the block begins.
        """

    def open(self, name: str) -> AbstractAsyncContextManager[ByteSource]:
        """Read an object; ImageError if there is none."""

    def open_ranges(self, name: str) -> AbstractAsyncContextManager[RangeSource]:
        """Read an object at any place; ImageError if there is none, UsageError where that cannot be done."""

    async def discard(self, name: str) -> None:
        """Remove an object, if it is there; where that cannot be done, it is among `remains` then."""


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
        from pipeline.transport.object_store import ObjectStorage

        return ObjectStorage(url)
    raise UsageError(f"{url}: not a directory, file://, s3://bucket/prefix or - (standard output)")


def reference(storage: Storage, seen_from: Storage) -> str:
    """How one storage is named by what is kept in another one; empty for itself. See `Layer`."""
    if not isinstance(storage, DirectoryStorage):
        return "" if storage.name == seen_from.name else storage.name
    if not isinstance(seen_from, DirectoryStorage):
        return f"file://{quote(storage.place)}"
    if os.path.realpath(storage.place) == os.path.realpath(seen_from.place):
        return ""
    return os.path.relpath(os.path.realpath(storage.place), os.path.realpath(seen_from.place))


def referred(storage: Storage, at: str) -> Storage:
    """The storage that something in `storage` names so; UsageError if it names none."""
    if not at:
        return storage
    if "://" in at or not isinstance(storage, DirectoryStorage):
        return open_storage(at)
    return DirectoryStorage(Path(os.path.normpath(os.path.join(os.path.realpath(storage.place), at))))


# -- directory --------------------------------------------------------------------------


class DirectoryStorage:
    """A directory that holds one image."""

    has_manifest = True
    reads_at_once = 2
    remains = ()

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        #: where it is, for who comes from another directory
        self.place = str(path.absolute())

    async def require_free(self) -> None:
        """See `Storage.require_free`; makes nothing."""
        self._require_free(set())

    def _require_free(self, ours: set[str]) -> None:
        try:
            there = set(os.listdir(self._path)) - ours
        except FileNotFoundError:
            there = set()
        except NotADirectoryError:
            raise UsageError(f"{self.name} is not a directory; give --to a new one") from None
        except OSError as error:
            raise UsageError(f"{self.name}: {said(error)}") from None
        if CLAIM in there:
            raise UsageError(claimed_by_another(self.name))
        if there & {MANIFEST, IMAGE, LAYER}:
            raise UsageError(f"{self.name} holds an image already; give --to a new directory, or remove it")
        if there:
            raise UsageError(f"{self.name} is not empty; give --to a new directory, or empty it")
        above = _nearest_there(self._path)
        if not os.access(above, os.W_OK | os.X_OK):
            raise UsageError(f"{self.name}: no file can be made in {above}; give --to another place")

    @asynccontextmanager
    async def claimed(self) -> AsyncIterator[None]:
        """See `Storage.claimed`."""
        claim = self._path / CLAIM
        with noted("image", self._path, _UNFINISHED) as content, self._directory():
            try:
                fd = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileExistsError:
                raise UsageError(claimed_by_another(self.name)) from None
            except OSError as error:
                raise StorageError(f"{self.name}: {said(error)}") from error
            LEDGER.take("claimed place", claim)
            try:
                try:
                    with os.fdopen(fd, "wb") as file:
                        file.write(content)
                except OSError as error:
                    raise StorageError(f"{claim}: {said(error)}") from error
                self._require_free({CLAIM})
                yield
            finally:
                with suppress(FileNotFoundError):
                    claim.unlink()
                LEDGER.give_back("claimed place", claim)

    @contextmanager
    def _directory(self) -> Iterator[None]:
        """The directory is there; one that was not before is not left empty."""
        made = not self._path.exists()
        try:
            try:
                self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"{self.name}: {said(error)}") from error
            yield
        finally:
            if made:
                with suppress(OSError):
                    self._path.rmdir()  # only succeeds if nothing came into being

    @asynccontextmanager
    async def create(self, name: str, room_bytes: int = 0) -> AsyncIterator[ByteSink]:
        """See `Storage.create`."""
        try:
            temporary = self._path / f".{name}.{os.getpid()}.partial"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.name}: {said(error)}") from error
        LEDGER.take("partial file", temporary)
        try:
            await make_room(LocalFd(fd), room_bytes)
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    sink = LateFileSink(fd, str(self._path / name), nursery)
                    yield sink
            await trio.to_thread.run_sync(self._complete, name, sink, temporary, room_bytes > 0)
        finally:
            os.close(fd)
            with suppress(FileNotFoundError):
                temporary.unlink()
            LEDGER.give_back("partial file", temporary)

    def _complete(self, name: str, sink: LateFileSink, temporary: Path, has_room: bool) -> None:
        """Let a file that is written have its name, in any thread; StorageError."""
        sink.write_late()
        try:
            if has_room:
                give_back_room(LocalFd(sink.fd))
            os.fsync(sink.fd)
            if name == MANIFEST:
                _sync_directory(self._path)
            os.rename(temporary, self._path / name)
            if name == MANIFEST:
                _sync_directory(self._path)
        except OSError as error:
            raise StorageError(f"{self._path / name}: {said(error)}") from error

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[ByteSource]:
        """See `Storage.open`."""
        with self._opened(name) as fd:
            yield FileSource(fd, str(self._path / name))

    @asynccontextmanager
    async def open_ranges(self, name: str) -> AsyncIterator[RangeSource]:
        """See `Storage.open_ranges`; the file that is open stays the same, whatever its name becomes."""
        with self._opened(name) as fd:
            yield FileRanges(fd, str(self._path / name))

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
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
            yield fd
        finally:
            os.close(fd)

    async def discard(self, name: str) -> None:
        """See `Storage.discard`."""
        with suppress(OSError):
            (self._path / name).unlink()


def claimed_by_another(place: str) -> str:
    """What is said of a place where somebody else is writing an image."""
    return (
        f"{place}: another dump is writing an image there; give --to another place, or, if it was killed, remove "
        f"what it has left ({CLAIM}, and what is beside it; of a directory, `python -m pipeline clean` does)"
    )


def _nearest_there(path: Path) -> Path:
    """`path`, or the nearest directory above it that exists."""
    return next(at for at in (path, *path.absolute().parents) if os.path.lexists(at))


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
