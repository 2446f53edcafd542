"""What mappings refer to: files, shared anonymous memory, memfds; each registered once in a tree.

Shared memory is an object of its own with its own pages, whoever maps it or holds a
descriptor of it. It is known by (device, inode) of the kernel's internal tmpfs. It is
read through a descriptor (/proc/PID/map_files, or the target's own), where holes are
found by SEEK_DATA; a plain user may not open map_files, and reads anonymous shared
memory, and memfds that no descriptor refers to any more, through the mappings of its users: what nobody maps, nobody
can get at. Of such a memfd the mode, the owner and the seals are not known, and of no use without a descriptor.

A file is opened again by its name at the destination; the name must lead to the
mapped inode in the mount namespace of the process, which is looked up, not believed.
A file without any name is carried with its bytes; of one that has only another one than it was mapped by, that is
looked for (`pipeline.resources.other_names`). Refused: a file whose other name is not found.

Not preserved: times of a memfd. Sources: proc_pid_map_files(5), memfd_create(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Self

import msgspec

from pipeline.errors import passed_over, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Index, MappedFile, SharedMemory
from pipeline.kernel import hugetlb, procfs
from pipeline.kernel.inside import open_file
from pipeline.kernel.smaps import Mapping, exact_name
from pipeline.kernel.statfs import filesystem
from pipeline.ledger import LEDGER
from pipeline.resources.identity import identity
from pipeline.resources.kinds import FdView
from pipeline.resources.memory.classify import Backing, kernel_shmem_device
from pipeline.resources.memory.scope import CannotCarry, MemoryScope
from pipeline.resources.other_names import other_name
from pipeline.resources.paths import look_up, same_inode

_F_GET_SEALS = 1034
_F_SEAL_EXEC = 0x20
_DELETED = b" (deleted)"
_MEMFD = b"/memfd:"
#: what a restore that could not open map_files has made of shared anonymous memory (`pipeline.stages.contents`)
_RESTORED_ANON = b"/memfd:dev-zero (deleted)"
_ZERO_DEVICE = os.makedev(1, 5)
_READ = os.O_RDONLY | os.O_CLOEXEC

#: identity of an inode: st_dev, st_ino
InodeKey = tuple[int, int]
#: where names are looked up: inode of the mount namespace, root directory
Place = tuple[int, bytes]


class Window(msgspec.Struct, frozen=True):
    """A mapping through which shared memory can be read: [start, end) in `pid` shows it from `offset` on."""

    pid: HostPid
    start: int
    end: int
    offset: int


@dataclass
class SharedObject:
    """Shared memory of the tree: its record, and how to read it.

    `fd` is an open file description of our own (seeking it disturbs nobody), or None
    where it may not be opened: then `windows` are the way. Owned by `MemoryObjects`.
    `is_open`: the tree has descriptors of it.
    """

    record: SharedMemory
    fd: LocalFd | None
    windows: list[Window] = field(default_factory=list)
    is_open: bool = False


class MemoryObjects:
    """The registry of one capture; a context manager that closes what it opened.

    Register the memfds of all descriptors first (`memory_of`), then capture address
    spaces: for a plain user a memfd can only be opened by its descriptor.
    """

    def __init__(self, scope: MemoryScope) -> None:
        self.scope = scope
        self._files: dict[tuple[object, ...], Index] = {}
        self._records: list[MappedFile] = []
        #: f_type of the file systems on which files with a name are that may be written by way of a mapping
        self.written_on: set[int] = set()
        self._shared: dict[InodeKey, SharedObject] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give back every descriptor; idempotent."""
        for shared in self._shared.values():
            if shared.fd is not None:
                fd, shared.fd = shared.fd, None
                os.close(fd)
                LEDGER.give_back("shared memory", fd)

    @property
    def mapped_files(self) -> list[MappedFile]:
        """The records of all files, in the order of their indexes."""
        return list(self._records)

    @property
    def shared_memory(self) -> list[SharedObject]:
        """All shared memory, in the order of registration."""
        return list(self._shared.values())

    # -- shared memory ----------------------------------------------------------

    def memory_of(self, view: FdView) -> Index:
        """The space of the memfd (or shared memory) behind a descriptor, registered on first use.

        Raises:
            OSError: EACCES: it may not be opened for reading.
        """
        key = (view.stat.st_dev, view.stat.st_ino)
        if key not in self._shared:
            self._register_open(key, LocalFd(os.open(f"/proc/self/fd/{view.local}", _READ)), view.link)
        self._shared[key].is_open = True
        return self._shared[key].record.space

    def shared_mapping(self, pid: HostPid, mapping: Mapping, backing: Backing) -> Index:
        """The space of the shared memory that `mapping` shows.

        Raises:
            CannotCarry: it may not be read here.
        """
        key = (mapping.device, mapping.inode)
        if key not in self._shared:
            try:
                fd = LocalFd(os.open(f"/proc/{pid}/map_files/{mapping.range_name}", _READ))
            except OSError as error:
                if error.errno == errno.ENXIO:  # what a child of fork(2) has of a ring of asynchronous I/O
                    self._register_unopened(key, mapping)
                elif not isinstance(error, PermissionError):
                    raise
                else:
                    is_memfd = backing == "memfd" and mapping.name != _RESTORED_ANON
                    self._register_unopened(key, mapping, exact_name(pid, mapping) if is_memfd else b"")
            else:
                self._register_open(key, fd, b"" if backing == "anon_shared" else exact_name(pid, mapping))
        shared = self._shared[key]
        if shared.fd is None and shared.record.kind == "memfd":
            _require_shown(pid, mapping)
        shared.windows.append(Window(pid, mapping.start, mapping.end, mapping.offset))
        reach = mapping.offset + mapping.end - mapping.start
        if shared.fd is None and reach > shared.record.size_bytes:
            shared.record = msgspec.structs.replace(shared.record, size_bytes=reach)
        return shared.record.space

    def _register_unopened(self, key: InodeKey, mapping: Mapping, link: bytes = b"") -> None:
        record = SharedMemory(
            space=self.scope.space_of(("shared", *key)),
            kind="memfd" if link else "anon",
            size_bytes=0,
            name=_memfd_name(link),
            hugetlb=hugetlb.devices().get(mapping.device, 0),
        )
        self._shared[key] = SharedObject(record, None)

    def _register_open(self, key: InodeKey, fd: LocalFd, link: bytes) -> None:
        """Takes ownership of `fd`."""
        LEDGER.take("shared memory", fd)
        try:
            result = os.fstat(fd)
            memfd = link.startswith(_MEMFD)
            seals = fcntl.fcntl(fd, _F_GET_SEALS) if memfd else 0
            record = SharedMemory(
                space=self.scope.space_of(("shared", *key)),
                kind="memfd" if memfd else "anon",
                size_bytes=result.st_size,
                name=_memfd_name(link) if memfd else b"",
                seals=seals,
                mode=stat.S_IMODE(result.st_mode),
                uid=self.scope.user(result.st_uid),
                gid=self.scope.group(result.st_gid),
                hugetlb=hugetlb.devices().get(result.st_dev, 0),
                exec_sealed=bool(seals & _F_SEAL_EXEC),
            )
        except BaseException:
            os.close(fd)
            LEDGER.give_back("shared memory", fd)
            raise
        self._shared[key] = SharedObject(record, fd)

    # -- files --------------------------------------------------------------------

    def mapped_file(self, pid: HostPid, mapping: Mapping, writable: bool, place: Place) -> Index:
        """The index of the file that `mapping` shows.

        Args:
            pid: the process.
            mapping: of a file that is not shared memory.
            writable: it is a shared mapping of a file that was opened read-write.
            place: `place_of` `pid`.

        Raises:
            CannotCarry: it cannot be opened again at the destination; says why.
        """
        key = (*place, mapping.device, mapping.inode, mapping.name, writable)
        if key not in self._files:
            name = exact_name(pid, mapping)
            try:
                fd = os.open(f"/proc/{pid}/map_files/{mapping.range_name}", os.O_PATH | os.O_CLOEXEC)
            except PermissionError:
                fd = _open_by_name(pid, name, mapping)
            try:
                self._files[key] = self._register(pid, name, LocalFd(fd), key, writable, mapping.shared)
            finally:
                os.close(fd)
        return self._files[key]

    def executable(self, pid: HostPid, place: Place) -> Index:
        """The index of the file that /proc/PID/exe names; `place` is `place_of` `pid`.

        Raises:
            CannotCarry: it cannot be opened again at the destination; says why.
            ProcessGone: there is no such process.
        """
        name = procfs.read_link(pid, "exe")
        fd = LocalFd(os.open(f"/proc/{pid}/exe", os.O_PATH | os.O_CLOEXEC))
        try:
            result = os.fstat(fd)
            key = (*place, result.st_dev, result.st_ino, name.replace(b"\n", b"\\012"), False)
            if key not in self._files:
                self._files[key] = self._register(pid, name, fd, key, False, False)
            return self._files[key]
        finally:
            os.close(fd)

    def _register(
        self, pid: HostPid, name: bytes, fd: LocalFd, key: Hashable, writable: bool, shared: bool
    ) -> Index:
        """Make the record; `fd` (O_PATH) stays the caller's."""
        result = os.fstat(fd)
        _refuse_kind(result, shared)
        deleted = not _leads_to(pid, name, result)
        content = None
        last_name = b""
        if deleted and result.st_nlink:
            other = other_name(pid, name, result)
            if other is None:
                raise CannotCarry(
                    f"the name {os.fsdecode(name)} leads to another file, or to none, from inside",
                    "restart the program, or give the file its name back",
                )
            name, last_name, deleted = other, name.removesuffix(_DELETED), False
        elif deleted:
            name = name.removesuffix(_DELETED)
            content = self._content(fd, result, name)
        if not deleted:
            self._take_along(pid, name, fd)
            if writable:
                self.written_on.add(filesystem(fd))
        index = self.scope.file_of(key)
        self._records.append(
            MappedFile(
                index=index,
                path=self.scope.path(pid, name),
                identity=identity(fd),
                writable=writable,
                last_name=last_name,
                deleted=deleted,
                content=content,
            )
        )
        return index

    def _take_along(self, pid: HostPid, name: bytes, fd: LocalFd) -> None:
        try:
            self.scope.take_along(pid, name, fd)
        except OSError as error:
            raise_if_exhausted(error)
            why = f"the content of {os.fsdecode(name)} is to go along, and cannot be read: {error.strerror}"
            raise CannotCarry(why, "run as root, or bring the file to the destination") from None

    def _content(self, fd: LocalFd, result: os.stat_result, name: bytes) -> Index:
        try:
            reader = LocalFd(os.open(f"/proc/self/fd/{fd}", _READ))
        except PermissionError:
            raise CannotCarry(
                f"the deleted file {os.fsdecode(name)} may not be read", "run as root"
            ) from None
        key = (result.st_dev, result.st_ino)
        if result.st_dev == kernel_shmem_device() and name.startswith(_MEMFD):
            # a program that was executed from a memfd: the memfd is the file
            if key in self._shared:
                os.close(reader)
            else:
                self._register_open(key, reader, name)
            return self._shared[key].record.space
        try:
            return self.scope.content(reader, result.st_size)
        finally:
            os.close(reader)


def _memfd_name(link: bytes) -> bytes:
    return link[len(_MEMFD) :].removesuffix(_DELETED)


def _require_shown(pid: HostPid, mapping: Mapping) -> None:
    """A memfd that cannot be opened must be seen as it is, and as far as it goes, through a mapping."""
    why = None if mapping.shared else "is a private mapping of"
    if why is None:
        memory = open_file(pid, "mem", os.O_RDONLY)
        try:
            os.pread(memory, 1, mapping.end - 1)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            why = "reaches behind the end of"
        finally:
            os.close(memory)
    if why is not None:
        raise CannotCarry(
            f"{why} a memfd that no descriptor refers to any more; only root can open it",
            "run the pipeline as root, or keep the memfd open",
        )


def place_of(pid: HostPid) -> Place:
    """Where names of `pid` are looked up; raises `procfs.ProcessGone`."""
    try:
        namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
    except FileNotFoundError:
        raise procfs.ProcessGone(pid) from None
    return namespace, procfs.read_link(pid, "root")


def _refuse_kind(result: os.stat_result, shared: bool) -> None:
    if stat.S_ISREG(result.st_mode):
        return
    if stat.S_ISCHR(result.st_mode) and result.st_rdev == _ZERO_DEVICE and not shared:
        return
    if stat.S_ISCHR(result.st_mode) or stat.S_ISBLK(result.st_mode):
        device = f"{os.major(result.st_rdev)}:{os.minor(result.st_rdev)}"
        raise CannotCarry(f"maps device {device}", "close the device")
    raise CannotCarry("maps something that is no regular file")


def _leads_to(pid: HostPid, name: bytes, result: os.stat_result) -> bool:
    try:
        return same_inode(look_up(pid, name), result)
    except PermissionError:
        raise CannotCarry(f"the name {os.fsdecode(name)} may not be looked up", "run as root") from None
    except OSError as error:
        raise_if_exhausted(error)
        return False


def _open_by_name(pid: HostPid, name: bytes, mapping: Mapping) -> int:
    """For who may not open map_files: the file that has the name, if it has the mapping's inode number.

    (The device is not compared: btrfs and overlay tell another one by stat than in maps.)
    """
    fd = -1
    with passed_over():
        fd = open_file(pid, "root" + os.fsdecode(name), os.O_PATH | os.O_NOFOLLOW)
        if os.fstat(fd).st_ino == mapping.inode:
            return fd
    if fd >= 0:
        os.close(fd)
    raise CannotCarry(
        f"the name {os.fsdecode(name)} does not lead to the mapped file; only root can open it otherwise",
        "run the pipeline as root, or restart the program",
    )
