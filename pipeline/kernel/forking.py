"""A fork of a process that has threads and handlers of signals.

Handlers of Python may take locks (those of Trio do), and a lock that another thread holds in the moment of the fork is
held for ever in the child: a ^C of the terminal, or a SIGWINCH, that reached the child would leave it waiting, and its
parent for it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO

from pipeline.errors import ChildKilled, UsageError

#: how a child ends that failed without an error of the kernel
_NO_ERRNO = 255


def fork_deaf() -> int:
    """fork(2), with a child that no signal reaches but SIGKILL and SIGSTOP; for one that makes system calls and ends.

    Returns: 0 in the child, its pid in the parent.

    Raises:
        UsageError: see `require_told_ends`.
    """
    require_told_ends()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = 1
    try:
        child = os.fork()
    finally:
        if child:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def require_told_ends() -> None:
    """Make sure that this program is told of the ends of its children; the command line sees to that itself.

    Raises:
        UsageError: it ignores SIGCHLD, and the kernel buries them without a word (wait(2)).
    """
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise UsageError(
            "this program ignores SIGCHLD, and is not told how its children end; "
            "call signal.signal(signal.SIGCHLD, signal.SIG_DFL) first"
        )


@contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    """A pipe between a process and its child, its end to read from first; what is still open of it is closed."""
    read, write = os.pipe2(os.O_CLOEXEC)
    with FileIO(read, "rb") as reader, FileIO(write, "wb") as writer:
        yield reader, writer


def answer_of_child(act: Callable[[], bytes]) -> bytes:
    """What `act` says, which a child runs that no signal reaches; see `fork_deaf`.

    Raises:
        OSError: `act` raised it, with its errno; without one: the child has failed; or no process can be made.
        ChildKilled: the child was killed.
        UsageError: see `require_told_ends`.
    """
    with pipe() as (reader, writer):
        child = fork_deaf()
        if child == 0:
            code = _NO_ERRNO
            try:
                reader.close()
                left = memoryview(act())
                while left:
                    left = left[os.write(writer.fileno(), left) :]
                code = 0
            except OSError as error:
                code = min(error.errno or _NO_ERRNO, _NO_ERRNO)
            finally:
                os._exit(code)
        try:
            writer.close()
            answer = reader.readall()
        finally:
            reader.close()
            _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise ChildKilled
    if code:
        raise OSError(code, os.strerror(code)) if code < _NO_ERRNO else OSError(0, "its child has failed")
    return answer
