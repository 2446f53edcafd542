"""The cradle: the user namespace in which a plain user rebuilds.

Rebuilding needs capabilities: to choose pids, to mount, to set ids. A user who has none
on the host gets them in a user namespace of their own. The pipeline process itself
moves into it before anything else happens, and keeps its ids: the cradle maps each id
it may map to itself, so files stay accessible and images need no rebasing.

* With ``newuidmap`` and ranges in /etc/subuid, /etc/subgid: own euid and those ranges.
* Without: own euid and egid only (``setgroups`` denied); trees whose ids need more are
  refused by the translation, naming the id.

A dump does *not* enter a cradle: the right to look into a user's namespaces comes from
having made them, and is lost in a sibling namespace.

Sources: user_namespaces(7), newuidmap(1), subuid(5).
"""

from __future__ import annotations

import os
import struct
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.ids import LocalFd
from pipeline.image.schema import Extent
from pipeline.kernel import nsfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl, syscall, unshare
from pipeline.userns.idmap import parse
from pipeline.userns.permitted import ask_for_namespaces, has_tools, subordinate_ranges, user_name

_CAP_SYS_ADMIN = 21
_CAPABILITY_VERSION_3 = 0x20080522
_AMBIENT_RAISE = 2


def is_privileged() -> bool:
    """Whether this process can rebuild where it is: CAP_SYS_ADMIN in its own user namespace."""
    with open("/proc/self/status", "rb") as file:
        for line in file:
            if line.startswith(b"CapEff:"):
                return bool(int(line.split()[1], 16) >> _CAP_SYS_ADMIN & 1)
    return False


def owns_pid_namespace() -> bool:
    """Whether this process may choose pids where it is: its pid namespace is owned by its user namespace.

    In a cradle it is not: the tree then gets a pid namespace of its own.
    """
    fd = LocalFd(os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC))
    try:
        os.close(nsfs.owner(fd))
    except PermissionError:
        return False
    finally:
        os.close(fd)
    return is_privileged()


def enter() -> None:
    """Move this process into a cradle; nothing happens where it `is_privileged` already.

    Raises:
        PipelineError: the process has threads (only a single-threaded process can enter), or user
            namespaces are forbidden here.
    """
    if is_privileged():
        return
    if threading.active_count() > 1:
        raise PipelineError(
            "a rootless restore has to enter a user namespace before the process starts threads; "
            "use the command line, or call pipeline.userns.cradle.enter() first"
        )
    uid, gid = os.geteuid(), os.getegid()
    user = user_name(uid)
    uid_ranges = subordinate_ranges("/etc/subuid", user, uid)
    gid_ranges = subordinate_ranges("/etc/subgid", user, uid)
    whole = bool(uid_ranges and gid_ranges and has_tools())
    # the maps are written by a child that stays outside: newuidmap asks for that
    mapper = _Mapper(os.getpid(), uid, gid, uid_ranges, gid_ranges) if whole else None
    try:
        unshare(CLONE.NEWUSER)
    except OSError as error:
        if mapper is not None:
            mapper.give_up()
        raise PipelineError(
            f"this host does not let uid {uid} make user namespaces: {ask_for_namespaces(error)}"
        ) from error
    if mapper is not None:
        mapper.write()
    else:
        try:
            Path("/proc/self/setgroups").write_text("deny")
            _write("/proc/self/gid_map", f"{gid} {gid} 1")
            _write("/proc/self/uid_map", f"{uid} {uid} 1")
        except PermissionError as error:
            why = "; root without CAP_SETFCAP may not (user_namespaces(7))" * (uid == 0)
            raise PipelineError(
                f"this host does not let uid {uid} map itself into a user namespace{why}"
            ) from error
    prctl(PRCTL.SET_DUMPABLE, 1)  # our /proc files stay ours
    _keep_capabilities()


def trial() -> tuple[list[Extent], list[Extent]]:
    """The uid and gid map that a cradle of this process has, seen in a child that enters one.

    Raises:
        PipelineError: it cannot be entered; says why.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        answer = b""
        try:
            enter()
            answer = b"\0".join(Path(f"/proc/self/{kind}_map").read_bytes() for kind in ("uid", "gid"))
        except (PipelineError, OSError) as error:
            answer = str(error).encode()
        finally:
            os.write(writer, answer)
            os._exit(0)
    os.close(writer)
    try:
        with os.fdopen(reader, "rb") as file:
            answer = file.read()
    finally:
        os.waitpid(child, 0)
    uids, both, gids = answer.partition(b"\0")
    if not both:
        raise PipelineError(answer.decode(errors="replace") or "it ended without a word")
    return parse(uids), parse(gids)


def _keep_capabilities() -> None:
    """Make the capabilities ambient: whoever is not root in the cradle would lose them by execve."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    every = (1 << (_last_capability() + 1)) - 1
    low, high = every & 0xFFFF_FFFF, every >> 32
    syscall(NR.capset, header, struct.pack("<6I", low, low, low, high, high, high))
    for bit in range(_last_capability() + 1):
        prctl(PRCTL.CAP_AMBIENT, _AMBIENT_RAISE, bit)


def _last_capability() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


class _Mapper:
    """A child outside the cradle that runs newuidmap and newgidmap for its parent when told to."""

    def __init__(
        self, pid: int, uid: int, gid: int, uids: Sequence[tuple[int, int]], gids: Sequence[tuple[int, int]]
    ) -> None:
        ready, self._go = os.pipe()
        self._told, tell = os.pipe()
        self._child = os.fork()
        if self._child == 0:
            os.close(self._go)
            status = 1
            try:
                if os.read(ready, 1):
                    for tool, own, ranges in (("newuidmap", uid, uids), ("newgidmap", gid, gids)):
                        words = [
                            str(n) for first, count in [(own, 1), *ranges] for n in (first, first, count)
                        ]
                        done = subprocess.run([tool, str(pid), *words], capture_output=True, check=False)
                        if done.returncode:
                            os.write(tell, tool.encode() + b" failed: " + done.stderr.strip()[:1000])
                            break
                    else:
                        status = 0
            finally:
                os._exit(status)
        os.close(ready)
        os.close(tell)

    def write(self) -> None:
        """Let it write the maps and wait for it."""
        os.write(self._go, b"g")
        os.close(self._go)
        with os.fdopen(self._told, "rb") as file:
            told = file.read().decode(errors="replace").replace("\n", " ")
        _, status = os.waitpid(self._child, 0)
        if status:
            raise PipelineError(
                f"{told or 'newuidmap was not run'} (newuidmap and newgidmap have to be setuid root, or hold "
                "cap_setuid and cap_setgid, and no mount option or no_new_privs may take that away; this user needs a "
                "name in /etc/passwd; as root: apt-get install --reinstall uidmap)"
            )

    def give_up(self) -> None:
        """Let it go without having written anything."""
        os.close(self._go)
        os.close(self._told)
        os.waitpid(self._child, 0)
