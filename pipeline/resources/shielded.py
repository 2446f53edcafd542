"""Borrowing state of a live target and giving it back, whatever becomes of the pipeline meanwhile.

A child does it: neither SIGKILL nor any other end of the pipeline stops it, and its end is the end of the loan.

Source: fork(2), setsid(2).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def shielded(act: Callable[[], bytes]) -> bytes:
    """Run `act` in a child that no signal but SIGKILL for itself can stop.

    Raises:
        OSError: `act` raised it, with its errno; without one: the child was killed.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            os.setsid()
            os.close(reader)
            left = memoryview(act())
            while left:
                left = left[os.write(writer, left) :]
            code = 0
        except OSError as error:
            code = error.errno or 255
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise OSError(max(0, code), os.strerror(code) if code > 0 else f"killed by signal {-code}")
    return answer
