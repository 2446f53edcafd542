"""uts and ipc namespaces: host name, domain name, System V limits.

Captured by a visitor that joins the namespace. ipc namespaces are carried while they
hold no objects: System V segments, semaphores and queues, and POSIX message queues,
are refused by name; limits that differ from a fresh namespace's are set again.

Sources: uts_namespaces(7), ipc_namespaces(7), sysvipc(7).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import msgpack

from pipeline.errors import Blocker, RebuildError
from pipeline.image.schema import Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, mount, unshare
from pipeline.remote.puppet import Puppet
from pipeline.userns.visit import read_file, visit

#: what of /proc/sys belongs to an ipc namespace; the *_next_id files are for restorers of objects only
_SYSCTLS = (
    *(
        f"kernel/{name}"
        for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
    ),
    *(
        f"fs/mqueue/{name}"
        for name in ("queues_max", "msg_max", "msgsize_max", "msg_default", "msgsize_default")
    ),
)
_MS_PRIVATE_RECURSIVE = 0x40000 | 0x4000

#: descriptor and CLONE_NEW* flag of every namespace a visitor joins
Way = Sequence[tuple[int, int]]


class UtsState(Record, frozen=True, kw_only=True):
    """Host and NIS domain name."""

    hostname: bytes
    domainname: bytes


class IpcState(Record, frozen=True, kw_only=True):
    """Sysctls that differ from those of a fresh namespace, by their path below /proc/sys."""

    sysctls: dict[str, bytes] = {}


def capture_uts(way: Way) -> UtsState:
    """The names, as a visitor sees them."""

    def look() -> bytes:
        return read_file("/proc/sys/kernel/hostname") + b"\0" + read_file("/proc/sys/kernel/domainname")

    hostname, domainname = visit(way, look).split(b"\0")
    return UtsState(hostname=hostname.rstrip(b"\n"), domainname=domainname.rstrip(b"\n"))


def create_uts(state: UtsState, keeper: Puppet) -> None:
    """Set the names in the namespace that `keeper` has just made."""
    keeper.syscall(NR.sethostname, state.hostname, len(state.hostname))
    keeper.syscall(NR.setdomainname, state.domainname, len(state.domainname))


def _sysctls() -> dict[str, bytes]:
    return {
        name: read_file(f"/proc/sys/{name}").strip()
        for name in _SYSCTLS
        if os.path.exists(f"/proc/sys/{name}")
    }


def capture_ipc(subject: str, way: Way) -> tuple[IpcState, list[Blocker]]:
    """The limits that differ from a fresh namespace's; and objects, which are not carried."""

    def look() -> bytes:
        found = [
            what
            for name, what in (("shm", "shared memory"), ("sem", "semaphores"), ("msg", "message queues"))
            if read_file(f"/proc/sysvipc/{name}").count(b"\n") > 1
        ]
        found += [f"POSIX message queue /{name}" for name in os.listdir(_mount_mqueue())]
        here = _sysctls()
        unshare(CLONE.NEWIPC)
        fresh = _sysctls()
        limits = {name: value for name, value in here.items() if value != fresh[name]}
        packed: bytes = msgpack.packb((limits, found))
        return packed

    limits, objects = msgpack.unpackb(visit(way, look))
    blockers = [
        Blocker(subject, f"its ipc namespace holds {what}, which is not carried yet", "remove it (ipcrm)")
        for what in objects
    ]
    return IpcState(sysctls=limits), blockers


def _mount_mqueue() -> str:
    """Mount the message queues of the ipc namespace that the caller is in, where only the caller sees them."""
    unshare(CLONE.NEWNS)
    mount(None, b"/", None, _MS_PRIVATE_RECURSIVE)
    mount(b"mqueue", b"/proc/fs", b"mqueue", 0)
    return "/proc/fs"


def mqueue_device(way: Way) -> int:
    """st_dev of the mqueue file system of an ipc namespace; there is one for each."""
    return int(visit(way, lambda: b"%d" % os.stat(_mount_mqueue()).st_dev))


def create_ipc(state: IpcState, keeper: Puppet) -> None:
    """Set the limits in the namespace that `keeper` has just made.

    Args:
        state: comes from an image: a name that is none of ours is refused.
        keeper: is root inside where the owning user namespace maps uid 0: the files belong to root there,
            and no capability stands in for the uid.
    """
    for name, value in state.sysctls.items():
        if name not in _SYSCTLS:
            raise RebuildError(f"{name} is no limit of an ipc namespace")
        fd = keeper.syscall(NR.openat, -100, f"/proc/sys/{name}\0".encode(), os.O_WRONLY | os.O_CLOEXEC, 0)
        try:
            keeper.syscall(NR.write, fd, value, len(value))
        except OSError as error:
            raise RebuildError(
                f"/proc/sys/{name} of an ipc namespace may not become {value!r}: {error}"
            ) from error
        finally:
            keeper.syscall(NR.close, fd)
