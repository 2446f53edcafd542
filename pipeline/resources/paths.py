"""Names of open files: does the name still lead to the file, and opening it again by that name.

The kernel keeps a path (mount and dentry) with every open file; readlink of
/proc/PID/fd/N prints it, with `` (deleted)`` behind it where the last component was
unlinked. That text proves nothing (a file may really be called so, another file may
have taken the name, a mount may cover it), so the name is looked up in the mount
namespace of the process and the inode compared; or in that of the pipeline, where a process of another one
was handed a file that was opened there, such as the log of a container.

Sources: proc_pid_fd(5), openat2(2); fs/d_path.c.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from pipeline.errors import RebuildError, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import OpenFile, PathRef, Pid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.inside import opened
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.syscalls import RESOLVE, openat2, pidfd_getfd, pidfd_open
from pipeline.resources.kinds import CreateScope, FdView

DELETED = b" (deleted)"
NAME_REMOVED = "its name was removed"

#: set by the kernel on what a 64-bit program opens; Python's `os.O_LARGEFILE` is 0 there (x86_64 value)
O_LARGEFILE = 0o100000

#: flags of F_GETFL that only open(2) can give, or that open(2) should see
REOPEN_FLAGS = (
    os.O_ACCMODE
    | os.O_APPEND
    | os.O_DIRECT
    | os.O_DIRECTORY
    | os.O_DSYNC
    | os.O_NOATIME
    | os.O_NOFOLLOW
    | os.O_SYNC
)
_AT_FDCWD = -100


def same_inode(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether both results describe the same file."""
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


def _is_in_our_mounts(pid: HostPid) -> bool:
    return os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink("/proc/self/ns/mnt")


def _start(pid: HostPid, link: bytes) -> tuple[bytes, bytes]:
    """A directory of /proc to resolve in, and the path of `link` below it.

    Raises:
        OSError: ENOENT where the name cannot be reached in the mount namespace of `pid`.
    """
    if _is_in_our_mounts(pid):
        return b"/proc/self/root", link
    root = os.readlink(f"/proc/{pid}/root".encode())
    if root == b"/":
        below = link
    elif link == root:
        below = b"/"
    elif link.startswith(root + b"/"):
        below = link[len(root) :]
    else:
        # opened before chroot(2): a parent that has not changed its root still reaches it
        return f"/proc/{_unconfined(pid)}/root".encode(), link
    return f"/proc/{pid}/root".encode(), below


def _unconfined(pid: HostPid) -> HostPid:
    """The nearest ancestor in the same mount namespace whose root directory is the namespace's.

    Raises:
        OSError: ENOENT: there is none.
    """
    here = os.readlink(f"/proc/{pid}/ns/mnt")
    at = pid
    while os.readlink(f"/proc/{at}/root".encode()) != b"/":
        at = procfs.status(at).ppid
        if not at or os.readlink(f"/proc/{at}/ns/mnt") != here:
            raise FileNotFoundError(errno.ENOENT, f"outside the root directory of pid {pid}")
    return at


def open_place(pid: HostPid, link: bytes, flags: int = os.O_PATH) -> LocalFd:
    """Open what `link` leads to in the mount namespace of `pid`, without following a last symlink; the caller owns it.

    Args:
        pid: the process whose mount namespace is meant.
        link: as readlink of /proc/PID/fd/N printed it.

    Raises:
        OSError: ENOENT, ENOTDIR: nothing is there; EACCES: it cannot be looked up from here.
    """
    base, below = _start(pid, link)
    root = os.open(base, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return opened(
            pid, lambda: openat2(LocalFd(root), below, flags | os.O_NOFOLLOW, resolve=RESOLVE.IN_ROOT)
        )
    finally:
        os.close(root)


def look_up(pid: HostPid, link: bytes) -> os.stat_result:
    """fstat of what `open_place` finds, which raises as it does."""
    if link.startswith(b"/") and _is_in_our_mounts(pid):
        with suppress(PermissionError):  # it may be permitted from inside
            return os.stat(link, follow_symlinks=False)
    found = open_place(pid, link)
    try:
        return os.fstat(found)
    finally:
        os.close(found)


def misnamed(view: FdView) -> str | None:
    """What is wrong with the name of `view`; None if it leads to the open file."""
    wrong = wrong_name(view.namer, view.link, view.stat)
    mount = int(view.info.get("mnt_id", ["0"])[0])
    if wrong not in (None, NAME_REMOVED) and mount and _is_gone(mount, view.namer):
        return f"{wrong}; its mount was taken away (umount -l)"
    return wrong


def wrong_name(pid: HostPid, link: bytes, stat: os.stat_result) -> str | None:
    """What is wrong with the name `link` of the file that `stat` describes; None if it leads to it for `pid`."""
    if not link.startswith(b"/"):
        return "it has no path"
    try:
        found = look_up(pid, link)
    except OSError as error:
        raise_if_exhausted(error)
        if link.endswith(DELETED):
            return NAME_REMOVED
        if isinstance(error, PermissionError):
            return f"uid {os.geteuid()} may not search a directory on its path"
        return f"its name does not lead to it any more: {error.strerror or error}"
    if same_inode(found, stat):
        return None
    if link.endswith(DELETED):
        return NAME_REMOVED
    return "its name leads to another file now (covered by a mount, or opened in another mount namespace)"


def _is_gone(mount: int, pid: HostPid) -> bool:
    """Whether no mount of this number is seen where `pid` is, nor where the pipeline is, which may have handed it on.

    Known only where both have the root directory of their namespace.
    """
    try:
        if os.readlink(f"/proc/{pid}/root") != "/" or os.readlink("/proc/self/root") != "/":
            return False
        return all(one.id != mount for who in (pid, HostPid(os.getpid())) for one in mountinfo(who))
    except procfs.ProcessGone:
        return False
    except OSError as error:
        raise_if_exhausted(error)
        return False


def taken_over(view: FdView) -> bool:
    """Whether another file has the name that the removed file of `view` had."""
    try:
        look_up(view.namer, view.link.removesuffix(DELETED))
    except OSError as error:
        raise_if_exhausted(error)
        return False
    return True


def describe(file: OpenFile, path: PathRef | None = None) -> str:
    """How a message about a rebuild names an open file of the image."""
    return f"open file {file.index} ({file.kind})" + (f" {os.fsdecode(path.path)}" if path else "")


def reopen(
    file: OpenFile,
    path: PathRef,
    flags: int,
    scope: CreateScope,
    by: Callable[[PathRef, int], LocalFd] | None = None,
) -> LocalFd:
    """Open `path` again for `file`; never blocks, so O_NONBLOCK may be set on the result.

    Args:
        flags: what F_GETFL said; flags that only F_SETFL gives are left to the engine.
        by: opens it instead of `scope`.

    Raises:
        RebuildError: it cannot be opened here; names the path.
    """
    wanted = flags & REOPEN_FLAGS | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return by(path, wanted) if by is not None else scope.open(path, wanted)
    except OSError as error:
        raise RebuildError(f"{describe(file, path)} cannot be opened: {error.strerror or error}") from error


def open_inside(opener: Pid, scope: CreateScope, path: PathRef, flags: int) -> LocalFd:
    """Let a process of the tree open a path, and take the descriptor over; the caller owns it.

    Args:
        opener: its level-0 pid.

    Raises:
        OSError: what it met.
    """
    with ExitStack() as taken:
        with ExitStack() as theirs:
            process = pidfd_open(scope.host_pid(opener))
            theirs.callback(os.close, process)
            number = scope.inject(opener, NR.openat, _AT_FDCWD, path.path + b"\0", flags, 0)
            theirs.callback(scope.inject, opener, NR.close, number)
            ours = pidfd_getfd(process, number)
            taken.callback(os.close, ours)
        taken.pop_all()
    return ours


def seek(file: OpenFile, scope: CreateScope) -> None:
    """Give the local descriptor of `file` the position it had, for kinds that have one.

    Raises:
        RebuildError: the file does not take this position.
    """
    try:
        os.lseek(scope.file(file.index), file.position, os.SEEK_SET)
    except (OSError, OverflowError) as error:
        raise RebuildError(f"{describe(file)} does not take position {file.position}: {error}") from error


def open_again(fd: int, flags: int) -> LocalFd:
    """A new open file description of the inode behind local descriptor `fd`; the caller owns it.

    Raises:
        OSError: EACCES for what this process may not open, EINVAL for flags that do not fit.
    """
    wanted = flags & (REOPEN_FLAGS & ~(os.O_NOFOLLOW | os.O_DIRECTORY)) | os.O_NONBLOCK | os.O_CLOEXEC
    return LocalFd(os.open(f"/proc/self/fd/{fd}", wanted))


@contextmanager
def closed_on_error(fd: LocalFd) -> Iterator[LocalFd]:
    """Close a local descriptor if the block fails; else it stays open and is the caller's."""
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise
