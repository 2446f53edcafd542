r"""The mappings of a process: /proc/PID/smaps with their VmFlags, /proc/PID/maps without.

One mapping is a `Mapping`. smaps is the only place where the kernel tells advice,
locks and seals (VmFlags); it walks the page tables to do so, maps does not.

A name is printed with newlines as ``\012`` and nothing else escaped, so a backslash
in a name makes it ambiguous: `exact_name` asks /proc/PID/map_files, which is exact.
Whether `` (deleted)`` belongs to the name is not decided here.

Sources: proc_pid_maps(5), proc_pid_smaps(5); fs/proc/task_mmu.c.
"""

from __future__ import annotations

import functools
import os
import re
from typing import NamedTuple

from pipeline.ids import HostPid, RemoteAddress
from pipeline.kernel import procfs

_NO_FLAGS: frozenset[str] = frozenset()
_PKEY = re.compile(rb"\nProtectionKey: +([1-9]\d*)$", re.MULTILINE)
_PAGE_SIZE = re.compile(rb"\nKernelPageSize: +(\d+) kB$", re.MULTILINE)
_HUGE = re.compile(rb"\nAnonHugePages: +[1-9]")
_SWAPPED = re.compile(rb"^Swap: +(\d+) kB$", re.MULTILINE)
_SHARE = re.compile(rb"^Pss_Anon: +(\d+) kB$", re.MULTILINE)
_WRITTEN = re.compile(
    rb"^(?:Pss_Anon|Pss_Shmem|SwapPss|Shared_Hugetlb|Private_Hugetlb): +(\d+) kB$", re.MULTILINE
)
_KIB = 1024
#: lines that are kept: forks, libraries, and the second look at a process show the same ones
_KEPT_LINES = 1 << 14


class Mapping(NamedTuple):
    """One line of maps, with what smaps adds.

    `device` is as os.makedev makes it; on filesystems with several devices behind one
    mount (btrfs, overlay) it is *not* what stat(2) says. `flags` are the two-letter
    VmFlags, empty when read from maps. `name` is raw: see `exact_name`.
    """

    start: RemoteAddress
    end: RemoteAddress
    perms: bytes
    offset: int
    device: int
    inode: int
    name: bytes
    flags: frozenset[str] = _NO_FLAGS
    page_bytes: int = 4096
    pkey: int = 0

    @property
    def prot(self) -> int:
        """PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4."""
        perms = self.perms
        return (perms[0] != 0x2D) | (perms[1] != 0x2D) << 1 | (perms[2] != 0x2D) << 2

    @property
    def readable(self) -> bool:
        """PROT_READ."""
        return self.perms[0] == 0x72

    @property
    def writable(self) -> bool:
        """PROT_WRITE."""
        return self.perms[1] == 0x77

    @property
    def executable(self) -> bool:
        """PROT_EXEC."""
        return self.perms[2] == 0x78

    @property
    def shared(self) -> bool:
        """MAP_SHARED: writes are seen by others."""
        return self.perms[3] == 0x73

    @property
    def anonymous(self) -> bool:
        """There is no file behind it."""
        return not self.inode and not self.device

    @property
    def range_name(self) -> str:
        """Its name under /proc/PID/map_files."""
        return f"{self.start:x}-{self.end:x}"


@functools.lru_cache(_KEPT_LINES)
def _mapping(line: bytes, letters: bytes = b"", page_bytes: int = 4096, pkey: int = 0) -> Mapping:
    words = line.split(b" ", 5)
    start, _, end = words[0].partition(b"-")
    major, _, minor = words[3].partition(b":")
    return Mapping(
        start=RemoteAddress(int(start, 16)),
        end=RemoteAddress(int(end, 16)),
        perms=words[1],
        offset=int(words[2], 16),
        device=os.makedev(int(major, 16), int(minor, 16)),
        inode=int(words[4]),
        name=words[5].lstrip(b" ") if len(words) > 5 else b"",
        flags=_flags(letters),
        page_bytes=page_bytes,
        pkey=pkey,
    )


@functools.lru_cache
def _flags(letters: bytes) -> frozenset[str]:
    return frozenset(letters.decode().split())


def parse_maps(content: bytes) -> list[Mapping]:
    """Parse /proc/PID/maps: ascending, without flags."""
    return [_mapping(line) for line in content.split(b"\n") if line]


def parse_smaps(content: bytes) -> list[Mapping]:
    """Parse /proc/PID/smaps: ascending.

    Only the first and the last line of each entry are looked at, and those in between
    that say something unusual; 20,000 entries take about 0.1 s.
    """
    found: list[Mapping] = []
    entries = content.split(b"\nVmFlags: ")
    odd_pages = content.count(b"\nKernelPageSize:        4 kB\n") != len(entries) - 1
    odd_keys = _PKEY.search(content) is not None
    body = entries[0]
    for entry in entries[1:]:
        letters, _, following = entry.partition(b"\n")
        page_bytes, pkey = 4096, 0
        if odd_pages and (match := _PAGE_SIZE.search(body)):
            page_bytes = int(match[1]) * _KIB
        if odd_keys and (match := _PKEY.search(body)):
            pkey = int(match[1])
        found.append(_mapping(body[: body.index(b"\n")], letters, page_bytes, pkey))
        body = following
    return found


def maps(pid: HostPid) -> list[Mapping]:
    """Read /proc/PID/maps; empty for a zombie. Raises `procfs.ProcessGone`; EACCES."""
    return parse_maps(procfs.read_file(pid, "maps"))


def smaps(pid: HostPid) -> list[Mapping]:
    """Read /proc/PID/smaps; empty for a zombie. Raises `procfs.ProcessGone`; EACCES."""
    return parse_smaps(procfs.read_file(pid, "smaps"))


def with_huge_pages(pid: HostPid) -> list[tuple[RemoteAddress, RemoteAddress]]:
    """The mappings, [start, end), parts of whose private memory are huge pages; empty for a zombie.

    Raises as `maps` does.
    """
    entries = procfs.read_file(pid, "smaps").split(b"\nVmFlags: ")
    # an entry begins behind the flags of the one before
    lines = [one.split(b"\n", 2)[1 if at else 0] for at, one in enumerate(entries[:-1]) if _HUGE.search(one)]
    return [(one.start, one.end) for one in parse_maps(b"\n".join(lines))]


def anonymous_share(pid: HostPid) -> int:
    """Bytes of private memory that a process has, its part of what it shares with others; 0 for a zombie.

    Raises as `maps` does.

    Source: proc_pid_smaps(5), Pss_Anon of smaps_rollup.
    """
    return _rolled_up(pid, _SHARE)


def written_share(pid: HostPid) -> int:
    """As `anonymous_share`, with what is swapped, shared or of mapped tmpfs files, and all huge pages of hugetlbfs."""
    return _rolled_up(pid, _WRITTEN)


def swapped_bytes(pid: HostPid) -> int:
    """Bytes of the memory of a process that are swapped out; 0 for a zombie. Raises as `maps` does."""
    return _rolled_up(pid, _SWAPPED)


def _rolled_up(pid: HostPid, line: re.Pattern[bytes]) -> int:
    return _KIB * sum(map(int, line.findall(procfs.read_file(pid, "smaps_rollup"))))


def exact_name(pid: HostPid, mapping: Mapping) -> bytes:
    """The name of a file mapping, byte for byte, as a readlink prints it.

    Raises:
        ProcessGone, FileNotFoundError: the mapping is gone.
    """
    if b"\\" not in mapping.name:
        return mapping.name
    return procfs.read_link(pid, f"map_files/{mapping.range_name}")
