"""Files and directories that a restore makes, and removes again unless they are kept.

Nothing that is there is ever replaced. A file is written without a name (O_TMPFILE) and gets its name when it is
complete: whoever is killed meanwhile leaves nothing of it. On a filesystem without such files it has a made-up name
until then (``.NAME.xxxxxxxx``), which is left behind by a SIGKILL at that moment; so is, everywhere, what is complete.

Sources: open(2) O_TMPFILE, linkat(2), renameat2(2) RENAME_NOREPLACE.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.ids import LocalFd
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import RESOLVE, openat2, syscall
from pipeline.ledger import LEDGER

_RENAME_NOREPLACE = 1
_LEDGER = "file that came along"


class MadeFiles:
    """What was made; a directory is given as a descriptor (O_PATH) that stays the caller's."""

    def __init__(self) -> None:
        #: directory, name in it, whether a directory was made there
        self._made: list[tuple[LocalFd, bytes, bool]] = []

    def keep(self) -> None:
        """What was made stays."""
        while self._made:
            self._forget(self._made.pop())

    def close(self) -> None:
        """Remove what was made and is not kept; idempotent."""
        while self._made:
            directory, name, is_directory = one = self._made.pop()
            with suppress(OSError):  # somebody else has removed it, or put something into the directory
                (os.rmdir if is_directory else os.unlink)(name, dir_fd=directory)
            self._forget(one)

    def directory(self, above: LocalFd, name: bytes, mode: int, uid: int, gid: int) -> None:
        """Make the directory `name` in `above`.

        Raises:
            OSError: EEXIST: the name is taken; what the kernel says.
            ValueError: it is no name.
        """
        with self._noted(above, name, is_directory=True):
            os.mkdir(name, 0o700, dir_fd=above)
        found = openat2(above, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, 0, RESOLVE.BENEATH)
        try:
            give_owner(found, uid, gid)
            os.fchmod(found, mode)
        finally:
            os.close(found)

    def file(self, above: LocalFd, name: bytes, fill: Callable[[LocalFd], None]) -> None:
        """Make the file `name` in `above`, of which `fill` makes what it shall be.

        Raises:
            OSError, ValueError: as `directory`, and what `fill` raises.
        """
        fd, made_up = _nameless(above, name)
        try:
            fill(fd)
            with self._noted(above, name, is_directory=False):
                if made_up:
                    syscall(NR.renameat2, above, made_up + b"\0", above, name + b"\0", _RENAME_NOREPLACE)
                else:
                    os.link(b"/proc/self/fd/%d" % fd, name, dst_dir_fd=above, follow_symlinks=True)
        except BaseException:
            if made_up:
                os.unlink(made_up, dir_fd=above)
            raise
        finally:
            os.close(fd)

    @contextmanager
    def _noted(self, above: LocalFd, name: bytes, *, is_directory: bool) -> Iterator[None]:
        """It is ours to remove as soon as the body has made it."""
        one = LocalFd(os.dup(above)), name, is_directory
        LEDGER.take(_LEDGER, one[0])
        self._made.append(one)
        try:
            yield
        except BaseException:
            self._forget(self._made.pop())
            raise

    def _forget(self, one: tuple[LocalFd, bytes, bool]) -> None:
        os.close(one[0])
        LEDGER.give_back(_LEDGER, one[0])


def give_owner(fd: int, uid: int, gid: int) -> None:
    """fchown(2), where it would change anything."""
    found = os.fstat(fd)
    if (found.st_uid, found.st_gid) != (uid, gid):
        os.fchown(fd, uid, gid)


def _nameless(above: LocalFd, name: bytes) -> tuple[LocalFd, bytes]:
    """An empty file in `above`, and the made-up name that it has where it cannot be without; the caller owns both."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return LocalFd(os.open(b".", flags | os.O_TMPFILE, 0o600, dir_fd=above)), b""
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    made_up = b".%s.%s" % (name[:200], secrets.token_hex(4).encode())
    return LocalFd(
        os.open(made_up, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=above)
    ), made_up
