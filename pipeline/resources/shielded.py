"""Borrowing state of a live target and giving it back, whatever becomes of the pipeline meanwhile.

A child does it: neither SIGKILL nor any other end of the pipeline stops it, and its end is the end of the loan. And
the program must not see its state while it is lent. The kernel lets tracees go when the thread that traces them ends;
so the child traces that thread for as long, which then stops before it ends, SIGKILL or not, and waits for the child.

Source: fork(2), setsid(2); ptrace(2), PTRACE_O_TRACEEXIT; prctl(2), PR_SET_PTRACER; kernel/exit.c (do_exit stops
for the tracer before exit_notify, in which exit_ptrace lets tracees go).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pipeline.kernel import ptrace
from pipeline.kernel.forking import fork_deaf
from pipeline.kernel.syscalls import PRCTL, prctl


def shielded(act: Callable[[], bytes]) -> bytes:
    """Run `act` in a child that no signal but SIGKILL for itself can stop.

    Whom the calling thread traces is not let go before `act` is done, even if we are killed. Not so where the child
    may not trace us, because somebody else does (a debugger).

    Raises:
        OSError: `act` raised it, with its errno; without one: the child was killed.
    """
    caller = threading.get_native_id()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    with _children_may_trace_us():
        pid = fork_deaf()
        if pid == 0:
            code = 255
            try:
                os.setsid()
                os.close(reader)
                with _kept_from_ending(caller):
                    answer = act()
                left = memoryview(answer)
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


@contextmanager
def _children_may_trace_us() -> Iterator[None]:
    """Where Yama lets nobody trace who is not below oneself."""
    with suppress(OSError):  # EINVAL: no Yama
        prctl(PRCTL.SET_PTRACER, os.getpid())
    try:
        yield
    finally:
        with suppress(OSError):
            prctl(PRCTL.SET_PTRACER, 0)


@contextmanager
def _kept_from_ending(tid: int) -> Iterator[None]:
    """If a thread of another process is to end, it does so behind the block; the one who calls is its tracer."""
    try:
        ptrace.seize(tid, ptrace.OPTION.TRACEEXIT)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it has ended, or a second SIGKILL has sent it on
            ptrace.interrupt(tid)
            stop = ptrace.wait(tid)
            if stop is not None and not stop.exited:
                # a signal that was about to be delivered is; it may be the thread that has to read our answer
                ptrace.detach(tid, 0 if stop.event else stop.signal)
