"""A fork of a process that has threads and handlers of signals.

Handlers of Python may take locks (those of Trio do), and a lock that another thread holds in the moment of the fork is
held for ever in the child: a ^C of the terminal, or a SIGWINCH, that reached the child would leave it waiting, and its
parent for it.
"""

from __future__ import annotations

import os
import signal


def fork_deaf() -> int:
    """fork(2), with a child that no signal reaches but SIGKILL and SIGSTOP; for one that makes system calls and ends.

    Returns: 0 in the child, its pid in the parent.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = 1
    try:
        child = os.fork()
    finally:
        if child:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child
