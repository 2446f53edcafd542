"""The cgroups of a tree, looked at: which are its own, what is set in them, and who is where.

A cgroup is the tree's *own* if nobody else lives in it or below it; it goes along, with all cgroups below it, what is
set there and to whom its files were handed. A cgroup that is shared with others belongs to the surroundings: the
destination supplies it. So a container or a service keeps its limits, and a program that was started in somebody's
session is restored in the session of whoever restores it.

Refused: a frozen cgroup; BPF programs attached to an own one, which cannot be read back; an own one in a hierarchy
that is not mounted where the pipeline runs.

Sources: cgroups(7); Documentation/admin-guide/cgroup-v2.rst; BPF_PROG_QUERY in bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.image.schema import Cgroup, CgroupFile, Id
from pipeline.kernel import cgroupfs, procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.cgroupfs import UNIFIED, Hierarchy
from pipeline.kernel.syscalls import syscall
from pipeline.resources.cgroups import settings
from pipeline.resources.support import Support

SUPPORT = Support(
    kind="cgroups",
    carried=(
        "cgroups that only the tree lives in, of both versions, with members, threads apart, too",
        "limits and other settings, owners and permissions of delegated ones, extended attributes",
    ),
    refused=(
        "a frozen one; one with BPF programs; one in a hierarchy that is not mounted where the pipeline runs",
        "at the destination: one in which others live, a limit or controller that is not to be had there",
    ),
    shown_by=("resources/test_cgroups.py", "test_containers.py"),
)

IGNORE = "leave its cgroups behind: --cgroup ignore"
_BPF_PROG_QUERY = 16
#: enum bpf_attach_type has some sixty members by now; those that are not of cgroups are EINVAL
_ATTACH_TYPES = range(64)
#: of files that the kernel makes in a cgroup, where not said by name
_MODES = frozenset({0o444, 0o644, 0o200})
_MODE_OF = {b"": 0o755, b"cgroup.event_control": 0o222, b"memory.pressure_level": 0}

#: hierarchy and path
Place = tuple[str, bytes]


class CgroupCapture:
    """The cgroups of a tree.

    Args:
        pids: its processes, zombies too; one whose first thread has ended by another; empty: their cgroups are
            left behind.
        is_member: whether a pid, of a process or thread, is the tree's.
    """

    def __init__(self, pids: Iterable[HostPid], is_member: Callable[[int], object]) -> None:
        self._is_member = is_member
        self._numbers: dict[Place, int] = {}
        self.places: dict[int, dict[str, bytes]] = {}
        #: of threads that are not where their process is, by process
        self._elsewhere: dict[int, dict[int, dict[str, bytes]]] = {}
        for pid in pids:
            with suppress(procfs.ProcessGone):
                self.places[pid] = cgroupfs.places(pid)
                self._learn_threads(pid)
        self._here = cgroupfs.places(HostPid(os.getpid()))

    def _learn_threads(self, pid: HostPid) -> None:
        tids = procfs.tasks(pid)
        for tid in tids if len(tids) > 1 else ():
            with suppress(procfs.ProcessGone):
                places = cgroupfs.places(pid, tid)
                if places != self.places[pid]:
                    self._elsewhere.setdefault(pid, {})[tid] = places

    @cached_property
    def _hierarchies(self) -> dict[str, Hierarchy]:
        return cgroupfs.hierarchies(self._here)

    @cached_property
    def _tops(self) -> dict[Place, Place]:
        """Every place of a member, with the outermost own cgroup that it is in; without those of the surroundings."""
        found: dict[Place, Place] = {}
        apart = (places for threads in self._elsewhere.values() for places in threads.values())
        for places in (*self.places.values(), *apart):
            for place in places.items():
                if place not in found:
                    top = self._top(place)
                    if top is not None:
                        found[place] = top
        return found

    def _top(self, place: Place) -> Place | None:
        name, path = place
        top = None
        while path != b"/" and not cgroupfs.is_outside(path) and self._is_own((name, path)):
            top = (name, path)
            path = os.path.dirname(path)
        return top

    def _is_own(self, place: Place) -> bool:
        """Whether only the tree lives in a cgroup and below it."""
        name, path = place
        here = self._here.get(name, b"/")
        if here == path or here.startswith(path + b"/"):
            return False  # we live there ourselves
        directory = self._directory(place)
        return directory is not None and self._only_members(directory)

    def _only_members(self, directory: bytes) -> bool:
        try:
            return all(map(self._is_member, cgroupfs.members(directory))) and all(
                map(self._only_members, cgroupfs.children(directory))
            )
        except FileNotFoundError:  # removed meanwhile
            return True

    def _directory(self, place: Place) -> bytes | None:
        hierarchy = self._hierarchies.get(place[0])
        return None if hierarchy is None else hierarchy.directory(place[1])

    # -- numbers ---------------------------------------------------------------------------

    def number(self, place: Place) -> int:
        """The `Cgroup` index of a place."""
        return self._numbers.setdefault(place, len(self._numbers))

    def is_own(self, place: Place) -> bool:
        """Whether a place is the tree's own."""
        return any(
            place[0] == name and (place[1] == path or place[1].startswith(path + b"/"))
            for name, path in self._tops.values()
        )

    def of_process(self, pid: HostPid) -> list[int]:
        """The own cgroups that a process is in."""
        return self._own_of(self.places.get(pid, {}))

    def of_thread(self, pid: HostPid, tid: int) -> list[int] | None:
        """Those of a thread; None where they are those of its process."""
        places = self._elsewhere.get(pid, {}).get(tid)
        return None if places is None else self._own_of(places)

    def _own_of(self, places: Mapping[str, bytes]) -> list[int]:
        return [self.number(place) for place in places.items() if self.is_own(place)]

    # -- what is refused ---------------------------------------------------------------------

    def blockers(self) -> Iterator[Blocker]:
        """What stops the tree."""
        frozen: set[Place] = set()
        for pid, places in self.places.items():
            for place in places.items():
                if place not in frozen and self._is_frozen(place):
                    frozen.add(place)
                    yield Blocker(
                        f"pid {pid}",
                        f"its cgroup {_name(place)} is frozen",
                        "thaw it",
                        transient=True,
                        hinders_stop=True,
                    )
                if place[1] != self._here.get(place[0]) and self._is_hidden(place):
                    reason = f"it is in cgroup {_name(place)}, whose hierarchy is not mounted here"
                    yield Blocker(f"pid {pid}", reason, f"mount it, or {IGNORE}")
        for name, path in sorted(set(self._tops.values())):
            directory = self._directory((name, path))
            if name == UNIFIED and directory is not None:
                for below in _walk(directory):
                    if _has_programs(below):
                        reason = "has BPF programs attached, such as those that guard devices: they cannot be read back"
                        yield Blocker(f"cgroup {os.fsdecode(below)}", reason, IGNORE)

    def _is_hidden(self, place: Place) -> bool:
        return place[1] != b"/" and not cgroupfs.is_outside(place[1]) and self._directory(place) is None

    def _is_frozen(self, place: Place) -> bool:
        directory = None if place[1] == b"/" else self._directory(place)
        if directory is None or (place[0] != UNIFIED and "freezer" not in place[0].split(",")):
            return False
        try:
            if place[0] == UNIFIED:
                with open(directory + b"/cgroup.events", "rb") as file:
                    return b"frozen 1" in file.read().splitlines()
            with open(directory + b"/freezer.state", "rb") as file:
                return file.read().strip() != b"THAWED"
        except FileNotFoundError:
            return False

    # -- records -------------------------------------------------------------------------------

    def records(self) -> list[Cgroup]:
        """Every own cgroup, those above before those below, and those of the surroundings that have a number."""
        found: dict[Place, Cgroup] = {}
        for name, path in sorted(set(self._tops.values())):
            top = self._directory((name, path))
            assert top is not None
            for directory in _walk(top):
                place = (name, path + directory[len(top) :])
                with suppress(FileNotFoundError):
                    found[place] = self._record(place, directory)
        for place, number in self._numbers.items():
            if place not in found:
                found[place] = Cgroup(index=number, hierarchy=place[0], path=place[1], own=False)
        return list(found.values())

    def _record(self, place: Place, directory: bytes) -> Cgroup:
        return Cgroup(
            index=self.number(place),
            hierarchy=place[0],
            path=place[1],
            own=True,
            threaded=_line(directory, b"cgroup.type") == b"threaded",
            opened=[word.decode() for word in _line(directory, b"cgroup.subtree_control").split()],
            settings=settings.to_record(settings.current(directory)),
            files=list(_handed_out(directory)),
            xattrs={
                name: os.getxattr(directory, name)
                for name in os.listxattr(directory)
                if name.startswith(settings.KEPT_XATTRS)
            },
        )


def _name(place: Place) -> str:
    return f"{place[1].decode(errors='replace')} ({place[0] or 'version 2'})"


def _walk(directory: bytes) -> Iterator[bytes]:
    """A cgroup and all below it, those above first."""
    yield directory
    with suppress(FileNotFoundError):
        for below in cgroupfs.children(directory):
            yield from _walk(below)


def _line(directory: bytes, name: bytes) -> bytes:
    try:
        with open(directory + b"/" + name, "rb") as file:
            return file.read().strip()
    except FileNotFoundError:
        return b""


def _handed_out(directory: bytes) -> Iterator[CgroupFile]:
    """Whatever is not host root's, or has other permissions than the kernel gives it."""
    for name in (b"", *sorted(os.listdir(directory))):
        found = os.lstat(directory + b"/" + name)
        if name and not stat.S_ISREG(found.st_mode):
            continue  # another cgroup
        mode = stat.S_IMODE(found.st_mode)
        usual = mode == _MODE_OF[name] if name in _MODE_OF else mode in _MODES
        if found.st_uid or found.st_gid or not usual:
            yield CgroupFile(os.fsdecode(name), Id(0, found.st_uid), Id(0, found.st_gid), mode)


class _Query(ctypes.Structure):
    """What BPF_PROG_QUERY takes of `union bpf_attr`."""

    _fields_ = (
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("prog_cnt", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("rest", ctypes.c_uint64 * 4),
    )


def _has_programs(directory: bytes) -> bool:
    """Whether BPF programs are attached to this very cgroup; False where we may not ask, as a plain user."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for kind in _ATTACH_TYPES:
            query = _Query(target_fd=fd, attach_type=kind)
            try:
                syscall(NR.bpf, _BPF_PROG_QUERY, ctypes.addressof(query), ctypes.sizeof(query))
            except OSError as error:
                if error.errno not in {errno.EINVAL, errno.ENOSPC}:
                    return False
            if query.prog_cnt:
                return True
        return False
    finally:
        os.close(fd)
