"""The cgroups of an image, made again at the destination.

The order:

1. `make`: the directories, those above first, and what must be set before anybody can be inside (cpusets, threaded).
2. A cgroup namespace begins where its maker is: its keeper goes there for that moment (`visiting`).
3. `open`: controllers for those below. Of version 2 a cgroup that has opened any takes no process.
4. `place`: each process when it has been born, before it has memory, which is charged to where it is then;
   `place_threads`: those that are elsewhere.
5. `settle`: limits, owners, extended attributes; last of all, because limits would stop what is made here.

A cgroup that is there already is used if nobody is in it. One in which others live is not touched: the tree's cgroups
may be made below it, but no process of the tree is put into it.

Made directories are removed if the tree does not come to run. After that they are the tree's, and stay when it has
ended, as those of other programs do.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import Cgroup, Id, Process
from pipeline.kernel import cgroupfs
from pipeline.kernel.cgroupfs import UNIFIED
from pipeline.ledger import LEDGER
from pipeline.resources.cgroups import settings

_ELSEWHERE = "restore with --cgroup ignore, or with --cgroup PATH to make its cgroups in another one"
_REMOVAL_S = 2.0


class CgroupMaking:
    """Makes them, and puts processes into them; see the module.

    Args:
        cgroups: of the image, by index.
        used: those of them that processes are in themselves, not only below.
        wanted: ``keep``, ``ignore``, or the path of a cgroup to make them in.
        user, group: what an id of the image is called here.
    """

    def __init__(
        self,
        cgroups: Mapping[int, Cgroup],
        used: set[int],
        wanted: str,
        user: Callable[[Id], int],
        group: Callable[[Id], int],
    ) -> None:
        self._cgroups = {} if wanted == "ignore" else cgroups
        self._used = used
        self._wanted = wanted
        self._user = user
        self._group = group
        self._here = cgroupfs.places(HostPid(os.getpid()))
        #: of the hierarchies in which the tree has cgroups
        self._names = {one.hierarchy for one in self._cgroups.values()}
        self._hierarchies = cgroupfs.hierarchies({n: p for n, p in self._here.items() if n in self._names})
        #: where each is made or found
        self._paths = {index: self._target(one) for index, one in self._cgroups.items()}
        #: those in which others live
        self._shared: set[int] = set()
        self._made: list[bytes] = []

    # -- where -------------------------------------------------------------------------------

    def _target(self, one: Cgroup) -> bytes:
        if self._wanted == "keep":
            return one.path
        base = os.fsencode(self._wanted).rstrip(b"/")
        if not one.own:
            return base or b"/"
        top = one.path
        own = {
            other.path for other in self._cgroups.values() if other.own and other.hierarchy == one.hierarchy
        }
        while (above := os.path.dirname(top)) != top and above in own:
            top = above
        return base + b"/" + os.path.basename(top) + one.path[len(top) :]

    def _directory(self, hierarchy: str, path: bytes) -> bytes | None:
        found = self._hierarchies.get(hierarchy)
        return None if found is None else found.directory(path)

    def _at(self, index: int) -> bytes:
        found = self._directory(self._cgroups[index].hierarchy, self._paths[index])
        if found is None:
            raise RebuildError(f"cgroup {os.fsdecode(self._paths[index])} is not to be seen here")
        return found

    def _in_order(self) -> list[int]:
        """Own ones, those above before those below."""
        own = [index for index, one in self._cgroups.items() if one.own]
        return sorted(own, key=lambda index: self._paths[index].count(b"/"))

    # -- before anything is made ----------------------------------------------------------------

    def check(self) -> Iterator[Blocker]:
        """What stops the cgroups from being made here."""
        for index, one in self._cgroups.items():
            path = self._paths[index]
            version = f"hierarchy {one.hierarchy}" if one.hierarchy else "version 2"
            subject = f"cgroup {os.fsdecode(path)} ({version})"
            if not (_is_path(one.path) and _is_path(path)) or (one.own and one.path == b"/"):
                yield Blocker(subject, "this is no path of a cgroup", _ELSEWHERE)
                continue
            directory = self._directory(one.hierarchy, path)
            if directory is None:
                yield Blocker(
                    subject, "this host has no such hierarchy, or it is not mounted here", _ELSEWHERE
                )
            elif not one.own:
                if not os.path.isdir(directory):
                    reason = "it is not there, and a cgroup namespace of the tree begins at it"
                    yield Blocker(subject, reason, f"make it, or {_ELSEWHERE}")
            elif os.path.isdir(directory):
                if _is_lived_in(directory):
                    self._shared.add(index)
                    if index in self._used and self._here.get(one.hierarchy) != path:
                        yield Blocker(subject, "others live in it", _ELSEWHERE)
                elif not os.access(directory + b"/cgroup.procs", os.W_OK):
                    yield Blocker(subject, "it is not ours to use", _ELSEWHERE)
            else:
                above = directory
                while not os.path.isdir(above):
                    above = os.path.dirname(above)
                if not os.access(above, os.W_OK):
                    reason = f"it cannot be made: {os.fsdecode(above)} may not be written to"
                    yield Blocker(subject, reason, _ELSEWHERE)

    # -- directories ------------------------------------------------------------------------------

    def make(self) -> None:
        """All directories, and what must be set before anybody is inside.

        Raises:
            RebuildError: the kernel refuses it; says which.
        """
        for index in self._in_order():
            if index in self._shared:
                continue
            one, directory = self._cgroups[index], self._at(index)
            try:
                self._make_directory(directory)
                if one.threaded:
                    settings.write(directory, "cgroup.type", b"threaded")
                now = settings.current(directory)
                for name, value in settings.changes(one.settings, now) if one.hierarchy else ():
                    if name in settings.EARLY:
                        settings.write(directory, name, value)
            except (OSError, settings.UnknownDeviceError) as error:
                raise RebuildError(
                    f"cgroup {os.fsdecode(self._paths[index])} cannot be made: {error}"
                ) from error

    def _make_directory(self, directory: bytes) -> None:
        if os.path.isdir(directory):
            return
        above = os.path.dirname(directory)
        self._make_directory(above)
        LEDGER.take("cgroup", directory)
        try:
            os.mkdir(directory)
        except BaseException:
            LEDGER.give_back("cgroup", directory)
            raise
        self._made.append(directory)
        for name in settings.CPUSET:
            place = os.path.join(directory, name.encode())
            if not os.path.exists(directory + b"/cgroup.type") and os.path.exists(place):
                with open(os.path.join(above, name.encode()), "rb") as file:
                    settings.write(directory, name, file.read().strip())

    @contextmanager
    def visiting(self, roots: Sequence[int], pid: HostPid) -> Iterator[None]:
        """Somebody of ours is in these cgroups inside the block, and back in ours behind it.

        Raises:
            RebuildError: a root is none of the image's; the kernel refuses it.
        """
        roots = [] if self._wanted == "ignore" else roots
        if any(index not in self._cgroups for index in roots):
            raise RebuildError("a cgroup namespace begins at a cgroup that is not in the image")
        for index in roots:
            self._put(self._cgroups[index].hierarchy, self._paths[index], pid)
        yield
        for index in roots:
            name = self._cgroups[index].hierarchy
            self._put(name, self._here[name], pid)

    def open(self) -> None:
        """Controllers for those below.

        Raises:
            RebuildError: one is not to be had here.
        """
        for index in self._in_order():
            if index not in self._shared:
                for controller in self._cgroups[index].opened:
                    try:
                        settings.write(self._at(index), "cgroup.subtree_control", b"+" + controller.encode())
                    except OSError as error:
                        where = os.fsdecode(self._paths[index])
                        raise RebuildError(
                            f"cgroup {where}: controller {controller} is not to be had in it: {error}; enable it "
                            f"above (cgroup.subtree_control), or {_ELSEWHERE}"
                        ) from error

    # -- members ---------------------------------------------------------------------------------

    def place(self, process: Process, pid: HostPid) -> None:
        """Put a newborn process where it belongs; it is where its creator was."""
        if self._names:
            now = cgroupfs.places(pid)
            for name, path in self._wanted_places(process.cgroups).items():
                if now.get(name) != path:
                    self._put(name, path, pid)

    def place_threads(self, process: Process, tids: Sequence[int]) -> None:
        """Put those threads of a process elsewhere that are; `tids` in the order of the record."""
        for thread, tid in zip(process.threads, tids, strict=True):
            if thread.cgroups is not None and self._names:
                now = self._wanted_places(process.cgroups)
                for name, path in self._wanted_places(thread.cgroups).items():
                    if now[name] != path:
                        self._put(name, path, tid, b"/tasks" if name != UNIFIED else b"/cgroup.threads")

    def _wanted_places(self, cgroups: Sequence[int]) -> dict[str, bytes]:
        """Where somebody shall be, in all hierarchies in which the tree has cgroups."""
        found = {name: self._here[name] for name in self._names}
        return found | {
            self._cgroups[index].hierarchy: self._paths[index] for index in cgroups if index in self._cgroups
        }

    def _put(self, hierarchy: str, path: bytes, pid: int, file: bytes = b"/cgroup.procs") -> None:
        directory = self._directory(hierarchy, path)
        try:
            if directory is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            fd = os.open(directory + file, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"%d" % pid)
            finally:
                os.close(fd)
        except OSError as error:
            raise RebuildError(
                f"cgroup {os.fsdecode(path)} takes no process: {error}; {_ELSEWHERE}"
            ) from error

    # -- the end ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Limits, owners, extended attributes.

        Raises:
            RebuildError: the kernel refuses one; says which.
        """
        for index in self._in_order():
            if index in self._shared:
                continue
            one, directory = self._cgroups[index], self._at(index)
            subject = f"cgroup {os.fsdecode(self._paths[index])}"
            try:
                for name, value in settings.changes(one.settings, settings.current(directory)):
                    subject = (
                        f"cgroup {os.fsdecode(self._paths[index])}: {name} may not be {value.decode()!r} here"
                    )
                    settings.write(directory, name, value)
                for file in one.files:
                    subject = f"cgroup {os.fsdecode(self._paths[index])}: {file.name or 'its owner'}"
                    self._hand_out(
                        directory, file.name, self._user(file.uid), self._group(file.gid), file.mode
                    )
                for name, content in one.xattrs.items():
                    subject = f"cgroup {os.fsdecode(self._paths[index])}: attribute {name}"
                    if not name.startswith(settings.KEPT_XATTRS):
                        raise RebuildError(f"{subject} is of none of the classes that a cgroup keeps")
                    os.setxattr(directory, name, content)
            except (OSError, settings.UnknownDeviceError) as error:
                raise RebuildError(f"{subject}: {error}; {_ELSEWHERE}") from error
            missing = one.settings.keys() - settings.current(directory).keys()
            if missing:
                raise RebuildError(f"{subject}: there is no {min(missing)} here; {_ELSEWHERE}")

    @staticmethod
    def _hand_out(directory: bytes, name: str, uid: int, gid: int, mode: int) -> None:
        """Give a file in a cgroup, or itself, to somebody.

        Raises:
            RebuildError: `name` is no file in it.
        """
        if "/" in name or name in {".", ".."} or "\0" in name:
            raise RebuildError(f"{name!r} is no file of a cgroup")
        place = directory + b"/" + os.fsencode(name) if name else directory
        if name and not os.path.lexists(place):
            return  # another kernel has other files
        os.chown(place, uid, gid, follow_symlinks=False)
        os.chmod(place, mode & 0o777)

    def keep(self) -> None:
        """The tree runs: what was made is its own now."""
        while self._made:
            LEDGER.give_back("cgroup", self._made.pop())

    def close(self) -> None:
        """Remove what was made, unless it was kept; idempotent."""
        while self._made:
            directory = self._made.pop()
            deadline = time.monotonic() + _REMOVAL_S
            with suppress(FileNotFoundError):
                while not _removed(directory) and time.monotonic() < deadline:
                    time.sleep(0.005)
            LEDGER.give_back("cgroup", directory)


def _is_path(path: bytes) -> bool:
    """Whether this is a path of /proc/PID/cgroup inside the reader's cgroup namespace."""
    if path == b"/":
        return True
    first, *parts = path.split(b"/")
    return not first and bool(parts) and not {b"", b".", b".."} & set(parts) and not set(path) & set(b"\0\n")


def _is_lived_in(directory: bytes) -> bool:
    return bool(cgroupfs.members(directory)) or any(map(_is_lived_in, cgroupfs.children(directory)))


def _removed(directory: bytes) -> bool:
    """Try to remove a cgroup; False while somebody in it is just ending."""
    try:
        os.rmdir(directory)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    return True
