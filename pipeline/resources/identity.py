"""What a file must be at the destination to stand for the one that was open or mapped at the source.

An ELF file is the same if its size and its build id are (another host installs the
same package at another time). Any other regular file must have the same size and the
same time of last modification, to the nanosecond: both are recorded after the freeze,
so even a file that the tree itself writes has to be as the tree left it, wherever the tree may read it: it remembers
what was in there. What is open for writing only, such as a log, may have grown since, and nothing else. Permissions
and ownership are not compared.

Whoever restores may accept other files (``--files any``): then only the type counts.

Source: elf(5) (notes), inode(7).
"""

from __future__ import annotations

import os
import stat
import struct
import time
from contextlib import suppress

from pipeline.image.schema import FileIdentity
from pipeline.policy import Files

_NT_GNU_BUILD_ID = 3
_PT_NOTE = 4
_MAX_NOTES_BYTES = 1 << 16
#: build ids of files that had to be opened for them, by all that changes when such a file does: what was read before
#: the freeze is not read inside it, and no lease has to be looked for
_READ: dict[tuple[int, ...], bytes] = {}
_MAX_READ = 4096
#: a file that was changed just now could change again with the same times, where those are coarse
_SETTLED_NS = 2_000_000_000
#: how long the leases of `read_leases_ahead` are good: what somebody takes in between could as well be taken between a
#: look and what follows it
_AHEAD_S = 0.1
_KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


def build_id(fd: int) -> bytes:
    """The GNU build id of a 64-bit little-endian ELF file; empty if it has none or is not readable as one.

    Args:
        fd: a local descriptor that can be read; its position stays where it is.
    """
    header = os.pread(fd, 64, 0)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return b""
    offset, entry_bytes, entries = (
        *struct.unpack_from("<Q", header, 32),
        *struct.unpack_from("<HH", header, 54),
    )
    if offset >> 63:
        return b""
    table = os.pread(fd, min(entry_bytes * entries, _MAX_NOTES_BYTES), offset)
    for start in range(0, len(table) - 55, max(entry_bytes, 56)):
        kind, _, at, _, _, size = struct.unpack_from("<IIQQQQ", table, start)
        if kind == _PT_NOTE and not at >> 63:
            found = _in_notes(os.pread(fd, min(size, _MAX_NOTES_BYTES), at))
            if found:
                return found
    return b""


def _in_notes(notes: bytes) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, value_bytes, kind = struct.unpack_from("<III", notes, at)
        name = at + 12
        value = name + (name_bytes + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name : name + name_bytes] == b"GNU\0":
            return notes[value : value + value_bytes][:64]
        at = value + (value_bytes + 3 & ~3)
    return b""


class _Leases:
    """Lines of /proc/locks.

    For who has not just looked, the kernel waits for a grace period of RCU, some 10 ms: locks_start() in fs/locks.c.
    """

    def __init__(self) -> None:
        self._lines: list[bytes] = []
        self._good_until_s = 0.0

    def read_ahead(self) -> None:
        self._lines = self._read()
        self._good_until_s = time.monotonic() + _AHEAD_S

    def lines(self) -> list[bytes]:
        return self._lines if time.monotonic() < self._good_until_s else self._read()

    def _read(self) -> list[bytes]:
        with suppress(OSError), open("/proc/locks", "rb") as table:
            return [line for line in table if b" LEASE " in line]
        return []


_LEASES = _Leases()


def read_leases_ahead() -> None:
    """Let `is_leased` not wait for the kernel in the next moment; for a thread beside other work."""
    _LEASES.read_ahead()


def is_leased(fd: int) -> bool:
    """Whether somebody has a lease on the file behind local descriptor `fd`, which opening it could break."""
    inode = b":%d " % os.fstat(fd).st_ino
    return any(inode in line for line in _LEASES.lines())


def _build_id_by_reader(fd: int, found: os.stat_result) -> bytes:
    """Of a regular file that cannot be read through `fd`; `found` is its fstat."""
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    if key in _READ:
        return _READ[key]
    if is_leased(fd):
        return b""
    with suppress(OSError):  # what may not be read here is known by its modification time
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            read = build_id(reader)
        finally:
            os.close(reader)
        if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _SETTLED_NS:
            if len(_READ) >= _MAX_READ:
                _READ.clear()
            _READ[key] = read
        return read
    return b""


def identity(fd: int, *, look_inside: bool = True) -> FileIdentity:
    """What identifies the file behind local descriptor `fd` (also one that is write-only or O_PATH).

    Args:
        look_inside: an ELF file is opened for its build id, where it cannot be read through `fd`.
    """
    result = os.fstat(fd)
    found = b""
    if stat.S_ISREG(result.st_mode):
        try:
            found = build_id(fd)
        except OSError:  # EBADF: write-only or O_PATH; EINVAL: O_DIRECT
            found = _build_id_by_reader(fd, result) if look_inside else b""
    return FileIdentity(result.st_size, result.st_mtime_ns, result.st_mode, found)


def kind_of(mode: int) -> str:
    """``a directory`` for a mode of stat(2)."""
    return _KINDS.get(stat.S_IFMT(mode), f"of mode {mode:o}")


def difference(fd: int, wanted: FileIdentity, *, may_grow: bool = False) -> str | None:
    """How the file behind local descriptor `fd` differs from `wanted`, as words; None if it does not.

    Args:
        may_grow: it was open for writing only.
    """
    wrong = _other_type(os.fstat(fd).st_mode, wanted)
    if wrong or not stat.S_ISREG(wanted.mode):
        return wrong
    found = identity(fd, look_inside=bool(wanted.build_id) and not may_grow)
    if may_grow:
        shrunk = found.size_bytes < wanted.size_bytes
        return f"it has {found.size_bytes} bytes, and had {wanted.size_bytes}" if shrunk else None
    if found.size_bytes != wanted.size_bytes:
        return f"it has {found.size_bytes} bytes, and had {wanted.size_bytes}"
    if wanted.build_id:
        if found.build_id != wanted.build_id:
            return f"its build id is {found.build_id.hex() or 'not there'}, and was {wanted.build_id.hex()}"
    elif found.mtime_ns != wanted.mtime_ns:
        return f"it was modified at {_time(found.mtime_ns)}, and at the source at {_time(wanted.mtime_ns)}"
    return None


def refusal(fd: int, wanted: FileIdentity, files: Files, *, may_grow: bool = False) -> str | None:
    """`difference`, as far as whoever restores does not accept it."""
    if files == "any":
        return _other_type(os.fstat(fd).st_mode, wanted)
    return difference(fd, wanted, may_grow=may_grow)


def is_newer(fd: int, wanted: FileIdentity) -> bool:
    """Whether the file behind `fd` may be `wanted`, written to since; programs and libraries are not."""
    found = os.fstat(fd)
    is_same_type = stat.S_IFMT(found.st_mode) == stat.S_IFMT(wanted.mode)
    return is_same_type and not wanted.build_id and found.st_mtime_ns > wanted.mtime_ns


def _other_type(mode: int, wanted: FileIdentity) -> str | None:
    if stat.S_IFMT(mode) != stat.S_IFMT(wanted.mode):
        return f"it is {kind_of(mode)}, and was {kind_of(wanted.mode)}"
    return None


def _time(ns: int) -> str:
    """Seconds since the epoch with all nine digits, as ``stat -c %.9Y`` prints them."""
    return f"{ns // 1_000_000_000}.{ns % 1_000_000_000:09d}"
