"""What this host can do, and what would stop a tree from being carried.

Every row is a real probe of a feature (never of a version), in a short-lived child
where it would change this process. With a pid, everything that stops the tree is listed
at once; for that the tree stands still for some milliseconds, and runs on.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterable, Iterator

import trio
from msgspec import Struct

from pipeline.errors import Blocker, PipelineError
from pipeline.ids import LocalFd
from pipeline.kernel import soft_dirty, userfaultfd
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.forking import fork_deaf
from pipeline.kernel.syscalls import (
    CLONE,
    KCMP,
    PRCTL,
    kcmp,
    pidfd_getfd,
    pidfd_open,
    prctl,
    syscall,
    unshare,
)
from pipeline.policy import DumpPolicy
from pipeline.userns import cradle
from pipeline.userns.permitted import (
    ask_for_namespaces,
    ask_for_ranges,
    ask_for_tools,
    has_tools,
    subordinate_ranges,
    user_name,
)
from pipeline.userns.portrait import Portrait

_PR_SET_MM_MAP_SIZE = 15
_CAP_CHECKPOINT_RESTORE = 40
_CAP_SYS_ADMIN = 21
_CAP_SYS_RESOURCE = 24
_CAP_NET_ADMIN = 12


class Row(Struct, frozen=True):
    """One feature. `needed`: without it nothing works; else the detail says what is lost."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    needed: bool = True


class CheckReport(Struct, frozen=True):
    """The answer of `check`. `blockers` is empty where no pid was given, or where the tree can be carried.

    `portrait`: of the tree's namespaces; None where no pid was given, or where it may not be looked at.
    """

    rows: list[Row]
    blockers: list[Blocker]
    portrait: Portrait | None = None

    @property
    def ok(self) -> bool:
        """Whether everything needed is there and nothing stops the tree."""
        return not self.blockers and all(row.ok for row in self.rows if row.needed)


def _capabilities() -> int:
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def _in_child(act: Callable[[], object]) -> OSError | None:
    """Run `act` in a forked child; the OSError it ended with, if any."""
    pid = fork_deaf()
    if pid == 0:
        code = 255
        try:
            act()
            code = 0
        except OSError as error:
            code = min(error.errno or 255, 254)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return (
        None if code == 0 else OSError(code, os.strerror(code) if code > 0 else f"killed by signal {-code}")
    )


def _row(
    name: str, act: Callable[[], object], good: str, lost: str, remedy: str = "", needed: bool = True
) -> Row:
    try:
        act()
    except OSError as error:
        return Row(name, False, f"{error.strerror or error}: {lost}", remedy, needed)
    return Row(name, True, good, "", needed)


def _child_row(
    name: str, act: Callable[[], object], good: str, lost: str, remedy: str = "", needed: bool = True
) -> Row:
    def raise_it() -> None:
        error = _in_child(act)
        if error is not None:
            raise error

    return _row(name, raise_it, good, lost, remedy, needed)


def _open_map_file() -> None:
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
        span = next(line.split()[0] for line in maps if "/" in line)
    start, end = (int(part, 16) for part in span.split("-"))
    os.close(os.open(f"/proc/self/map_files/{start:x}-{end:x}", os.O_RDONLY | os.O_CLOEXEC))


def _pagemap_scan() -> None:
    from pipeline.kernel import pagemap

    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pagemap.scan(LocalFd(fd), 0, 1 << 12)
    finally:
        os.close(fd)


def _getfd() -> None:
    pidfd = pidfd_open(os.getpid())  # type: ignore[arg-type]
    try:
        os.close(pidfd_getfd(pidfd, pidfd))
    finally:
        os.close(pidfd)


def _children_file() -> None:
    with open(f"/proc/self/task/{os.getpid()}/children", "rb"):
        pass


def _host_rows() -> Iterator[Row]:
    caps = _capabilities()
    machine = platform.machine()
    yield Row("processor", machine == arch.MACHINE, machine, f"this version runs on {arch.MACHINE}")
    yield _row(
        "children lists", _children_file, "in /proc/PID/task", "no tree can be walked", "CONFIG_PROC_CHILDREN"
    )
    yield _row(
        "kcmp",
        lambda: kcmp(os.getpid(), os.getpid(), KCMP.VM),
        "works",
        "shared files are not told apart",
        "CONFIG_KCMP",
    )
    yield _row("pidfd_getfd", _getfd, "works", "descriptors cannot be looked at", "Linux 5.6 or newer")
    yield _row(
        "PAGEMAP_SCAN",
        _pagemap_scan,
        "works",
        "/proc/PID/pagemap is read page by page: slower",
        "Linux 6.7 or newer",
        needed=False,
    )
    yield _writes()
    size = ctypes.create_string_buffer(4)
    yield _row(
        "PR_SET_MM_MAP",
        lambda: syscall(NR.prctl, PRCTL.SET_MM, _PR_SET_MM_MAP_SIZE, size, 0, 0),
        "works",
        "nothing can be restored",
        "CONFIG_CHECKPOINT_RESTORE",
    )
    yield _user_namespaces()
    yield _child_row(
        "timer ids",
        lambda: prctl(PRCTL.TIMER_CREATE_RESTORE_IDS, 1),
        "can be chosen",
        "POSIX timers are restored by creating and deleting until the id fits",
        needed=False,
    )
    privileged = bool(caps >> _CAP_SYS_ADMIN & 1)
    choose = privileged or bool(caps >> _CAP_CHECKPOINT_RESTORE & 1)
    yield Row(
        "exact pids here",
        choose,
        "can be chosen"
        if choose
        else "not permitted: a tree is restored with its numbers into a pid namespace of its own",
        "" if choose else "to restore among the pids of this host: run as root (CAP_CHECKPOINT_RESTORE)",
        needed=False,
    )
    yield _row(
        "map_files",
        _open_map_file,
        "can be opened",
        "shared anonymous memory is restored as a memfd, and memfds without a descriptor are refused",
        "run as root (CAP_CHECKPOINT_RESTORE in the initial user namespace)",
        needed=False,
    )
    yield Row(
        "seccomp filters",
        privileged,
        "can be read" if privileged else "cannot be read: programs that have one are refused",
        "" if privileged else "run as root (CAP_SYS_ADMIN in the initial user namespace)",
        needed=False,
    )
    resource = bool(caps >> _CAP_SYS_RESOURCE & 1)
    yield Row(
        "CAP_SYS_RESOURCE",
        resource,
        "there" if resource else "not there: hard limits above ours are refused",
        "" if resource else "run as full root, or raise the hard limits of this shell",
        needed=False,
    )
    if not privileged:
        yield from _plain_user_rows()


def _writes() -> Row:
    """How it is told what a running program writes."""
    name = "writes"
    if userfaultfd.is_asynchronous():
        return Row(name, True, "are told by userfaultfd, while a tree runs", needed=False)
    if soft_dirty.is_known():
        detail = "are told by soft-dirty bits: a tree stands still for a moment in each round of its memory"
        return Row(name, True, detail, needed=False)
    lost = "are told by nothing: no rounds of memory while a tree runs, it is sent standing still"
    return Row(name, False, lost, "Linux 6.7 or newer, or CONFIG_MEM_SOFT_DIRTY", needed=False)


def _user_namespaces() -> Row:
    def make() -> None:
        unshare(CLONE.NEWUSER)
        unshare(CLONE.NEWNS)  # some security modules give an empty user namespace

    name, error = "user namespaces", _in_child(make)
    if error is None:
        return Row(name, True, "can be made")
    lost = "trees with user namespaces cannot be restored, and a plain user can restore nothing"
    return Row(name, False, f"cannot be made: {lost}", ask_for_namespaces(error))


def _plain_user_rows() -> Iterator[Row]:
    """Which ids a plain user can give to a tree; what is missing for more than one."""
    tools = has_tools()
    lost = "maps of one id only"
    yield Row(
        "newuidmap",
        tools,
        "installed, and newgidmap" if tools else f"not on PATH, or newgidmap is not: {lost}",
        "" if tools else ask_for_tools(),
        needed=False,
    )
    user = user_name()
    for kind in ("uid", "gid"):
        path = f"/etc/sub{kind}"
        ranges = subordinate_ranges(path, user, os.geteuid())
        yield Row(
            path,
            bool(ranges),
            f"{user} has {_ranges(ranges)}" if ranges else f"no range for {user}: {lost}",
            "" if ranges else ask_for_ranges(kinds=(kind,)),
            needed=False,
        )
    try:
        uids, gids = ([(line.inner, line.count) for line in lines] for lines in cradle.trial())
    except PipelineError as error:
        yield Row("ids of a tree", False, "none: nothing can be restored", str(error))
        return
    yield Row("ids of a tree", True, f"uid {_ranges(uids)}; gid {_ranges(gids)}")


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    """``1000, 100000-165535``."""
    return ", ".join(str(first) if count == 1 else f"{first}-{first + count - 1}" for first, count in ranges)


def host_rows() -> list[Row]:
    """What this host can do."""
    return list(_host_rows())


async def check(pid: int | None = None, policy: DumpPolicy | None = None) -> CheckReport:
    """Say what this host can do and, with a pid, everything that stops that tree, which stands still for a moment."""
    return await report_on(pid, await trio.to_thread.run_sync(host_rows), policy)


async def report_on(pid: int | None, rows: list[Row], policy: DumpPolicy | None = None) -> CheckReport:
    """What stops a tree, if one is meant.

    Args:
        pid: root of the tree, in the caller's pid namespace.
        rows: what this host can do.
        policy: decisions about states that have more than one good answer.
    """
    from pipeline.remote.tracer import tracer_thread
    from pipeline.stages.examine import portrait, tree_blockers

    if pid is None:
        return CheckReport(rows, [])
    async with tracer_thread() as tracer:
        blockers = await tracer.run(tree_blockers, pid, None, policy)
    return CheckReport(rows, sorted(set(blockers)), await trio.to_thread.run_sync(portrait, pid))
