"""Starting a program in new, nested namespaces, with or without root.

Namespaces are made in the order in which the kernel lets them own each other: user
namespaces from the outermost in, each mapped by a helper that stays in its parent;
then all the others at once, owned by the innermost. A pid or time namespace begins
with the next child, which is made a sibling (CLONE_PARENT), so that the program is
this process's own child and nothing of the scaffolding stays between them.

Which id the program gets in a user namespace: 0 where the map has it, else the
caller's own where the map has that, else the map's first. Supplementary groups are
dropped wherever the kernel permits it, because they would be unmapped inside.

Sources: user_namespaces(7), pid_namespaces(7), clone(2), capabilities(7), newuidmap(1).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import stat
import struct
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from pipeline.errors import PipelineError, UsageError
from pipeline.ids import HostPid
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import CLONE, PRCTL, mount, prctl, syscall, unshare
from pipeline.userns.permitted import ask_for_namespaces, ask_for_tools
from pipeline.userns.wanted import Extent, Granted, IdMap, granted, parse_map

__all__ = ("Extent", "Granted", "IdMap", "Surroundings", "parse_map", "start", "wait")

_CAP_SETGID, _CAP_SETUID = 6, 7
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 18
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_MOST_LEVELS = 32
_MORE_IDS = (
    "more ids than the own one need newuidmap, newgidmap and a range in /etc/subuid and /etc/subgid: "
    "`check` says which there are, and whom to ask for more"
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a program is started in.

    Args:
        users: user namespaces from the outermost in; None maps the caller's euid and egid to 0; ``auto``, for
            the outermost, all that the caller has.
        others: CLONE_NEW* of the other kinds, owned by the innermost user namespace.
        detach: a session of its own, and /dev/null where stdio is not a file.
    """

    users: Sequence[IdMap | Granted | None] = ()
    others: int = 0
    detach: bool = False


def start(command: Sequence[str], surroundings: Surroundings, mask: Sequence[int] = ()) -> HostPid:
    """Start `command`; it is a child of this process, which must be single-threaded.

    Args:
        command: program and arguments; the program is looked up in PATH, as the ids inside may see it.
        surroundings: its namespaces.
        mask: signals that the program starts with blocked.

    Returns:
        Its pid in this process's pid namespace.

    Raises:
        UsageError: too many levels, or ``auto`` not for the outermost.
        PipelineError: the kernel or newuidmap refused a step, or the program cannot be executed.
    """
    if len(surroundings.users) > _MOST_LEVELS:
        raise UsageError(f"user namespaces nest {_MOST_LEVELS} deep at most, not {len(surroundings.users)}")
    if "auto" in surroundings.users[1:]:
        raise UsageError(
            "auto, the ids that this user has on the host, is for the outermost user namespace only"
        )
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        os.close(reader)
        _child(command, surroundings, mask, writer)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8", errors="replace") as report:
        lines = report.read().splitlines()
    pid = first
    for line in lines:
        if line.startswith("pid "):
            os.waitpid(first, 0)
            pid = int(line.removeprefix("pid "))
    problems = [line.removeprefix("error ") for line in lines if line.startswith("error ")]
    if problems:
        os.waitpid(pid, 0)
        raise PipelineError(problems[0])
    return HostPid(pid)


def _child(command: Sequence[str], surroundings: Surroundings, mask: Sequence[int], writer: int) -> NoReturn:
    step = "start"
    try:
        for depth, wanted in enumerate(surroundings.users, 1):
            step = f"user namespace {depth}"
            _enter_user_namespace(wanted, writer)
        step = "namespaces"
        if surroundings.others:
            unshare(surroundings.others)
        if surroundings.others & (CLONE.NEWPID | CLONE.NEWTIME):
            step = "clone"
            pid = syscall(NR.clone, CLONE.PARENT | signal.SIGCHLD, 0, 0, 0, 0)
            if pid:
                os.write(writer, f"pid {pid}\n".encode())
                os._exit(0)
        step = "set up"
        _furnish(surroundings.others)
        if surroundings.users:
            prctl(PRCTL.SET_SECUREBITS, 0)
        if surroundings.detach:
            _detach(keep=writer)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        step = command[0]
        os.execvp(command[0], list(command))
    except OSError as error:
        _report(writer, f"{step}: {error.strerror or error}{_hint(step, error)}")
    except PipelineError as error:
        _report(writer, f"{step}: {error}")
    finally:
        os._exit(1)


def _hint(step: str, error: OSError) -> str:
    if step.startswith("user namespace"):
        return f" ({ask_for_namespaces(error)})"
    if isinstance(error, PermissionError) and step == "map":
        return f" (a map line must lie inside one line of the parent's map; {_MORE_IDS})"
    if isinstance(error, PermissionError) and step == "set up":
        return " (a new /proc can be mounted only where the one outside is fully visible)"
    if isinstance(error, PermissionError) and step not in {"start", "namespaces", "clone"}:
        return f" (as uid {os.geteuid()} inside; every directory on its path must be open to that id)"
    return ""


def _report(writer: int, text: str) -> None:
    with suppress(OSError):
        os.write(writer, b"error " + text.replace("\n", " ").encode() + b"\n")


def _enter_user_namespace(wanted: IdMap | Granted | None, writer: int) -> None:
    euid, egid = os.geteuid(), os.getegid()
    if wanted == "auto":
        uids, gids = granted("uid", euid), granted("gid", egid)
    else:
        uids = (Extent(0, euid, 1),) if wanted is None else wanted
        gids = (Extent(0, egid, 1),) if wanted is None else _for_groups(wanted, euid, egid)
    go_reader, go_writer = os.pipe()
    target = os.getpid()
    helper = os.fork()
    if helper == 0:
        code = 1
        try:
            os.close(go_writer)
            if os.read(go_reader, 1):
                _write_maps(target, uids, gids)
                code = 0
        except (OSError, PipelineError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            hint = _hint("map", error) if isinstance(error, OSError) else ""
            _report(writer, f"map {','.join(':'.join(map(str, e)) for e in uids)}: {reason}{hint}")
        finally:
            os._exit(code)
    os.close(go_reader)
    try:
        unshare(CLONE.NEWUSER)
        # the helper may have no right to files of a task that is not dumpable
        prctl(PRCTL.SET_DUMPABLE, 1)
        os.write(go_writer, b"x")
    finally:
        os.close(go_writer)
        status = os.waitpid(helper, 0)[1]
    if status:
        os._exit(1)  # the helper said why
    # ids change without losing the capabilities that the next steps need
    prctl(PRCTL.SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP)
    if Path("/proc/self/setgroups").read_text(encoding="ascii").strip() == "allow":
        os.setgroups([])
    gid, uid = _identity(gids, egid), _identity(uids, euid)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    prctl(PRCTL.SET_DUMPABLE, 1)


def _for_groups(uids: IdMap, euid: int, egid: int) -> IdMap:
    """The same map for groups; a line for just the caller's own uid becomes one for the own gid."""
    return tuple(
        extent._replace(outer=egid) if extent.length == 1 and extent.outer == euid else extent
        for extent in uids
    )


def _identity(extents: IdMap, own: int) -> int:
    if any(extent.inner == 0 for extent in extents):
        return 0
    for extent in extents:
        if extent.outer <= own < extent.outer + extent.length:
            return extent.inner + own - extent.outer
    return extents[0].inner


def _write_maps(target: int, uids: IdMap, gids: IdMap) -> None:
    """Write the maps of `target` from its parent user namespace: directly, or by newuidmap."""
    if _may_map_any():
        _put(target, "gid_map", "\n".join(extent.text() for extent in gids))
        _put(target, "uid_map", "\n".join(extent.text() for extent in uids))
        return
    own = [(e.outer, e.length) for e in (*uids, *gids)] == [(os.geteuid(), 1), (os.getegid(), 1)]
    if own:
        _put(target, "setgroups", "deny")
        _put(target, "gid_map", gids[0].text())
        _put(target, "uid_map", uids[0].text())
        return
    for tool, extents in (("newgidmap", gids), ("newuidmap", uids)):
        found = shutil.which(tool)
        if found is None:
            raise PipelineError(f"this map needs root, or: {ask_for_tools()}")
        words = [str(number) for extent in extents for number in extent]
        done = subprocess.run([found, str(target), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip() or f"{tool} ended with status {done.returncode}"
            raise PipelineError(f"{said} ({_MORE_IDS})")


def _put(target: int, name: str, text: str) -> None:
    fd = os.open(f"/proc/{target}/{name}", os.O_WRONLY)
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)


def _may_map_any() -> bool:
    with open("/proc/self/status", "rb") as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:"))
    return all(held >> capability & 1 for capability in (_CAP_SETUID, _CAP_SETGID))


def _furnish(others: int) -> None:
    """What a new namespace needs to be of use: private mounts, its own /proc, a loopback that is up."""
    if others & CLONE.NEWNS:
        mount(None, b"/", None, _MS_REC | _MS_PRIVATE)
        if others & CLONE.NEWPID:
            mount(b"proc", b"/proc", b"proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if others & CLONE.NEWNET:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            request = struct.pack("16sH22x", b"lo", 0)
            flags = struct.unpack_from("H", fcntl.ioctl(handle, _SIOCGIFFLAGS, request), 16)[0]
            fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _detach(keep: int) -> None:
    """A session of its own, nothing of the caller's terminal, pipes or other descriptors left."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        with suppress(OSError):
            state = os.fstat(fd)
            if stat.S_ISREG(state.st_mode) or (stat.S_ISCHR(state.st_mode) and not os.isatty(fd)):
                continue
        os.dup2(null, fd)
    os.closerange(3, keep)
    os.closerange(keep + 1, 1 << 16)


def wait(pid: HostPid, forwarded: Sequence[signal.Signals]) -> int:
    """Stay as the program's parent: pass on signals sent to this process, wait for its end.

    `forwarded` and SIGCHLD must be blocked in this process. A signal from the terminal
    reaches the program by itself and is not passed on a second time.

    Returns:
        Its wait status.
    """
    waited = {*forwarded, signal.SIGCHLD}
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        info = signal.sigwaitinfo(waited)
        if info.si_signo != signal.SIGCHLD and info.si_code <= 0:
            with suppress(ProcessLookupError):
                os.kill(pid, info.si_signo)
