"""Objects that hold bytes outside any one process: shared memory, memfds, unnamed files.

They are made before the first process, filled from page frames by their space number,
and handed to mappings and descriptors. Each is one local descriptor, owned here.

* MAP_SHARED|MAP_ANONYMOUS memory is mapped once by the launcher and then held through
  /proc/PID/map_files, so that it keeps its kind and name. Who may not open map_files
  (a plain user) gets a memfd instead: same behaviour, another name in /proc/PID/maps.
* Huge pages of hugetlbfs are made by the same calls; no page of them is taken before it is filled.
* F_SEAL_WRITE is put on when the pages are in, before anything maps the memory (it was sealed before its mappings were
  made, else the kernel had refused it). All other seals are put on behind the last pages: pages of a later round are
  written, too, and the last page reaches behind the end for a moment, which F_SEAL_GROW and F_SEAL_SHRINK forbid.
* The bytes of a deleted file live in an unnamed file (O_TMPFILE).

Source: memfd_create(2), fcntl(2) on seals, proc_pid_map_files(5).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import Content, Id, SharedMemory
from pipeline.kernel import hugetlb
from pipeline.kernel.arch.x86_64 import NR
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet
from pipeline.stages.places import FilePlace, HugeFilePlace, Place

_MFD_ALLOW_SEALING = 2
_MAP_SHARED_ANONYMOUS_NORESERVE = 0x1 | 0x20 | 0x4000
_MEMFD_NAME_BYTES = 249


class Contents:
    """All of them; `close` gives every descriptor back exactly once."""

    def __init__(self) -> None:
        self._fds: dict[int, LocalFd] = {}
        self._read_only: dict[int, LocalFd] = {}
        self._seals: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._huge_page_bytes: dict[int, int] = {}
        self._sealed: set[int] = set()

    def make(
        self, image: Image, launcher: Puppet, uid: Callable[[Id], int], gid: Callable[[Id], int]
    ) -> None:
        """Make every object of the image that is not there yet, empty.

        Args:
            launcher: maps anonymous memory.
            uid, gid: translate owners to ids here.

        Raises:
            RebuildError: this kernel makes none such, as with huge pages of a size that it does not have.
        """
        for shared in image.shared_memory.values():
            if shared.space in self._fds:
                continue
            with _told(shared):
                fd = self._make_shared(shared, launcher)
            self._keep(shared.space, fd, shared.size_bytes)
            if shared.hugetlb:
                self._huge_page_bytes[shared.space] = shared.hugetlb
            if shared.kind == "memfd" and shared.uid is not None and shared.gid is not None:
                _give(fd, uid(shared.uid), gid(shared.gid))
        for content in image.contents.values():
            if content.space not in self._fds:
                self._keep(content.space, self._make_file(content), content.size_bytes)

    def update(
        self, image: Image, launcher: Puppet, uid: Callable[[Id], int], gid: Callable[[Id], int]
    ) -> None:
        """Make what a later look at the same tree has found, too; what has another size by now gets it.

        Raises as `make` does.
        """
        objects: list[SharedMemory | Content] = [*image.shared_memory.values(), *image.contents.values()]
        for one in objects:
            if one.space in self._fds and one.size_bytes != self._sizes[one.space]:
                with _told(one):
                    os.ftruncate(self._fds[one.space], one.size_bytes)
                self._sizes[one.space] = one.size_bytes
        self.make(image, launcher, uid, gid)

    def _keep(self, space: int, fd: LocalFd, size_bytes: int) -> None:
        LEDGER.take("content", fd)
        self._sizes[space] = size_bytes
        self._fds[space] = fd

    def _make_shared(self, shared: SharedMemory, launcher: Puppet) -> LocalFd:
        if shared.kind == "anon":
            try:
                return self._anonymous(shared, launcher)
            except PermissionError:
                pass
        name = shared.name[:_MEMFD_NAME_BYTES] if shared.kind == "memfd" else b"dev-zero"
        flags = os.MFD_CLOEXEC | _MFD_ALLOW_SEALING
        if shared.hugetlb:
            flags |= hugetlb.memfd_flags(shared.hugetlb)
        fd = LocalFd(os.memfd_create(os.fsdecode(name), flags))
        try:
            os.ftruncate(fd, shared.size_bytes)
            if shared.kind == "memfd":
                os.fchmod(fd, shared.mode & 0o7777)
                self._seals[shared.space] = shared.seals
        except BaseException:
            os.close(fd)
            raise
        return fd

    @staticmethod
    def _anonymous(shared: SharedMemory, launcher: Puppet) -> LocalFd:
        size = shared.size_bytes
        flags = _MAP_SHARED_ANONYMOUS_NORESERVE
        if shared.hugetlb:
            flags |= hugetlb.mapping_flags(shared.hugetlb)
        address = launcher.syscall(NR.mmap, 0, size, 3, flags, -1, 0)
        try:
            return LocalFd(
                os.open(
                    f"/proc/{launcher.pid}/map_files/{address:x}-{address + size:x}", os.O_RDWR | os.O_CLOEXEC
                )
            )
        finally:
            launcher.syscall(NR.munmap, address, size)

    @staticmethod
    def _make_file(content: Content) -> LocalFd:
        with tempfile.TemporaryFile(buffering=0) as file:
            os.ftruncate(file.fileno(), content.size_bytes)
            return LocalFd(fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 0))

    def fd(self, space: int) -> LocalFd:
        """The descriptor of `space`; owned here."""
        try:
            return self._fds[space]
        except KeyError:
            raise RebuildError(
                f"space {space} is no shared memory and no file content of this image"
            ) from None

    def read_only(self, space: int) -> LocalFd:
        """A descriptor of `space` through which nothing can be mapped writable; owned here."""
        if space not in self._read_only:
            fd = LocalFd(os.open(f"/proc/self/fd/{self.fd(space)}", os.O_RDONLY | os.O_CLOEXEC))
            LEDGER.take("content", fd)
            self._read_only[space] = fd
        return self._read_only[space]

    def place(self, space: int) -> Place:
        """Where the pages of `space` are written."""
        if space in self._huge_page_bytes:
            return HugeFilePlace(self.fd(space), self._huge_page_bytes[space])
        return FilePlace(self.fd(space))

    def __contains__(self, space: int) -> bool:
        return space in self._fds

    def finish_fill(self, space: int) -> None:
        """The pages of `space` are in; cut off what the last page holds behind the end."""
        os.ftruncate(self._fds[space], self._sizes[space])

    def seal_writing(self) -> None:
        """The pages are in, and will be no others; nothing is mapped yet."""
        for space, seals in self._seals.items():
            if seals & fcntl.F_SEAL_WRITE and space not in self._sealed:
                fcntl.fcntl(self._fds[space], fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
                self._sealed.add(space)

    def seal_rest(self) -> None:
        """All mappings are made, all pages are in."""
        for space, seals in self._seals.items():
            if rest := seals & ~fcntl.F_SEAL_WRITE:
                fcntl.fcntl(self._fds[space], fcntl.F_ADD_SEALS, rest)

    def close(self) -> None:
        """Close all; idempotent."""
        for fds in (self._fds, self._read_only):
            while fds:
                _, fd = fds.popitem()
                os.close(fd)
                LEDGER.give_back("content", fd)


@contextmanager
def _told(one: SharedMemory | Content) -> Iterator[None]:
    """Say what could not be made."""
    try:
        yield
    except OSError as error:
        what = "a file without a name"
        if isinstance(one, SharedMemory):
            what = "a memfd" if one.kind == "memfd" else "shared memory"
            what += f" of huge pages of {one.hugetlb >> 10} kB" if one.hugetlb else ""
        size = f"{one.size_bytes} bytes"
        raise RebuildError(f"{what}, of {size}, cannot be made here: {error.strerror}") from error


def _give(fd: LocalFd, uid: int, gid: int) -> None:
    now = os.fstat(fd)
    if (now.st_uid, now.st_gid) != (uid, gid):
        try:
            os.fchown(fd, uid, gid)
        except OSError as error:
            raise RebuildError(f"a memfd cannot belong to {uid}:{gid} here: {error.strerror}") from error
