"""What a command has from whoever starts it, put in order before anything else is done."""

from __future__ import annotations

import os
import signal
import sys

#: which of 0, 1 and 2 nobody had opened
_closed: set[int] = set()


def settle() -> None:
    """Standard descriptors that are open, and children whose end is told.

    Where one of the three is closed, the next file that is opened becomes it: an image, or a socket, that every message
    goes into. Where SIGCHLD is ignored, which execve hands on, the kernel buries children without a word (wait(2)).
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            lowest = os.open(os.devnull, os.O_RDWR)  # which is this one
            os.set_inheritable(lowest, True)
            _closed.add(fd)
    # for as long as this process lives
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def was_closed(fd: int) -> bool:
    """Whether standard input (0), output (1) or error (2) was closed when we were started."""
    return fd in _closed
