"""Where the image of a tree may not go: into a file system that ends with the tree.

A tmpfs that only mount namespaces of the tree show, an overlay of such, is gone when its last process has ended, and
everything in it. The image would be complete, the tree killed for it, and neither would be left.

Source: mount_namespaces(7), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

from pipeline.errors import UsageError
from pipeline.ids import HostPid
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.stages.freeze import walk

#: the namespace of who may not be asked
_UNTOLD = "untold"
#: which are not there any more when nobody mounts them; of an overlay what it is made of may be, but nobody sees it
_PASSING = {Magic.TMPFS, Magic.RAMFS, Magic.OVERLAYFS}


def check_place(directory: str, tree: Collection[HostPid]) -> None:
    """Raise UsageError if an image in `directory` would end with its tree, as far as can be seen from here.

    Args:
        directory: exists.
        tree: the processes of the tree.
    """
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        if filesystem(fd) not in _PASSING:
            return
        device = os.fstat(fd).st_dev
    finally:
        os.close(fd)
    if not _shown_without(tree, device):
        raise UsageError(
            f"{directory} is in a file system that only the tree has mounted: with the tree, the image would be gone; "
            "give --to another place"
        )


def _shown_without(tree: Collection[HostPid], device: int) -> bool:
    """Whether a file system is mounted when the tree and this command have ended.

    This command may have been started in a mount namespace of the tree. Who has started it goes on there, and if a
    plain user may not ask them, they are taken to show it.
    """
    of_tree = set(map(_namespace, tree))
    own = HostPid(os.getpid())
    ending = {*tree, *walk(own)}
    is_inside = _namespace(own) in of_tree
    if not is_inside and _shows(own, device):
        return True
    seen = {"", _UNTOLD}
    for pid in sorted(HostPid(int(name)) for name in os.listdir("/proc") if name.isdecimal()):
        if pid in ending:
            continue
        namespace = _namespace(pid)
        if namespace == _UNTOLD and is_inside and pid == os.getppid():
            return True
        if namespace not in seen:
            if _shows(pid, device):
                return True
            seen.add(namespace)
    return False


def _namespace(pid: HostPid) -> str:
    """The mount namespace of a process; empty if it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/mnt")
    except PermissionError:
        return _UNTOLD
    except OSError:
        return ""


def _shows(pid: HostPid, device: int) -> bool:
    with suppress(OSError):
        return any(mount.device == device for mount in mountinfo(pid))
    return False
