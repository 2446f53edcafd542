"""Borrowing state of a live target and giving it back, whatever becomes of the pipeline meanwhile.

A child does it: neither SIGKILL nor any other end of the pipeline stops it, and its end is the end of the loan. And
the program must not see its state while it is lent. The kernel lets tracees go when the thread that traces them ends;
so the child traces that thread for as long, which then stops before it ends, SIGKILL or not, and waits for the child.

A fork takes some 2 ms, and each page that is touched behind it is copied: so the child may be there before the tree
stands still (`Shield`). It may then do what takes long and borrows nothing, too, while we do something else.

Source: fork(2), setsid(2); ptrace(2), PTRACE_O_TRACEEXIT; prctl(2), PR_SET_PTRACER; kernel/exit.c (do_exit stops
for the tracer before exit_notify, in which exit_ptrace lets tracees go).
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import NoReturn, TypeVarTuple

from pipeline.errors import ChildKilled
from pipeline.ids import LocalFd
from pipeline.kernel import ptrace
from pipeline.kernel.forking import answer_of_child, fork_deaf
from pipeline.kernel.syscalls import PRCTL, prctl
from pipeline.ledger import LEDGER

Ts = TypeVarTuple("Ts")

#: in front of what is asked: how many descriptors and bytes; and of the answer: an errno and how many bytes
_HEAD = struct.Struct("<IQ")
#: an answer that is none: the act has failed in some other way
_NO_ERRNO = 255
#: SCM_MAX_FD is 253
_FDS_AT_ONCE = 250
_ENTRY = "shield"
_READY = b"r"
#: for whom nobody need be kept from ending
_NOBODY = 0


def shielded(act: Callable[[], bytes]) -> bytes:
    """Run `act` in a child that no signal but SIGKILL for itself can stop.

    Whom the calling thread traces is not let go before `act` is done, even if we are killed. Not so where the child
    may not trace us, because somebody else does (a debugger).

    Raises:
        OSError: `act` raised it, with its errno.
        ChildKilled: the child was killed.
    """
    caller = threading.get_native_id()

    def act_there() -> bytes:
        os.setsid()
        with _kept_from_ending(caller):
            return act()

    with _children_may_trace_us():
        return answer_of_child(act_there)


class Shield:
    """Runs acts as `shielded` does, by a child that may be there before they are known.

    Used by one thread at a time. `close` lets the child end; it ends with us, too.
    """

    def __init__(self) -> None:
        self._child = 0
        self._control: socket.socket | None = None
        #: something was begun, whose answer is on its way
        self._is_busy = False
        self._answer: tuple[int, bytes] | None = None

    @property
    def child(self) -> int:
        """Its pid; 0 where there is none."""
        return self._child if self._control is not None else 0

    def start(self) -> None:
        """Let the child be there, holding nothing of ours; once is enough.

        Raises:
            OSError: there are too many processes or descriptors.
            ChildKilled: it was killed.
        """
        if self._control is not None:
            return
        ours, theirs = socket.socketpair()
        try:
            child = fork_deaf()
        except BaseException:
            ours.close()
            theirs.close()
            raise
        if child == 0:
            _stand_by(theirs)
        theirs.close()
        LEDGER.take(_ENTRY, child)
        self._child, self._control = child, ours
        try:
            # until then whoever looks finds that it holds files of the tree
            _exactly(ours, len(_READY))
        except (ConnectionError, EOFError):
            self.close()
            raise ChildKilled from None

    def run(self, act: Callable[[list[LocalFd], *Ts], bytes], fds: Sequence[LocalFd], *args: *Ts) -> bytes:
        """Run ``act(fds, ...)`` in the child.

        Args:
            act: a function of a module.
            fds: descriptors; the child has duplicates of them meanwhile.
            args: what can be pickled.

        Raises:
            OSError: as `shielded`.
        """
        self.settle()
        with _children_may_trace_us():
            if not self._ask(threading.get_native_id(), act, fds, args):
                return shielded(lambda: act(list(fds), *args))
            answer = self._hear()
        return _content(answer)

    def begin(self, act: Callable[[list[LocalFd], *Ts], bytes], fds: Sequence[LocalFd], *args: *Ts) -> bool:
        """Let the child do what borrows nothing, while we go on; `end` tells what has become of it.

        Args:
            act, fds, args: as for `run`.

        Returns:
            False where there is no child: nothing is done.
        """
        self.settle()
        self._answer = None
        self._is_busy = self._ask(_NOBODY, act, fds, args)
        return self._is_busy

    def end(self) -> bytes:
        """What was begun last has answered; told once.

        Raises:
            OSError: as `run`.
        """
        self.settle()
        answer, self._answer = self._answer, None
        return _content(answer)

    def settle(self) -> None:
        """Wait until the child holds nothing of what it was given; idempotent."""
        if self._is_busy:
            self._is_busy = False
            self._answer = self._hear()

    def close(self) -> None:
        """Let the child end, and collect it; idempotent."""
        self._is_busy = False
        if self._control is not None:
            self._control.close()
            self._control = None
            os.waitpid(self._child, 0)
            LEDGER.give_back(_ENTRY, self._child)

    def _ask(
        self, caller: int, act: Callable[..., bytes], fds: Sequence[LocalFd], args: tuple[object, ...]
    ) -> bool:
        """Whether the child has heard it. `caller`: the thread that is kept from ending."""
        if self._control is None:
            return False
        try:
            _send(self._control, len(fds), pickle.dumps((caller, act, args)), fds)
        except OSError:
            # it was killed, or too many descriptors are on their way: it has not heard all of it
            self.close()
            return False
        return True

    def _hear(self) -> tuple[int, bytes] | None:
        """An errno and the answer; None: it was killed."""
        assert self._control is not None
        try:
            return _receive(self._control)
        except (ConnectionError, EOFError):
            self.close()
            return None


def _content(answer: tuple[int, bytes] | None) -> bytes:
    if answer is None:
        raise ChildKilled
    code, content = answer
    if code:
        raise OSError(code, os.strerror(code) if code != _NO_ERRNO else "it has failed")
    return content


def _stand_by(control: socket.socket) -> NoReturn:
    """What the child does: it holds nothing of ours but an end of the connection, and acts until that is closed."""
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd == control.fileno():
                continue
            if fd <= 2:  # a tree may have these of us
                os.dup2(nothing, fd)
            else:
                with suppress(OSError):  # that of the list
                    os.close(fd)
        control.sendall(_READY)
        while True:
            asked, fds = _receive_with_fds(control)
            code, answer = 0, b""
            try:
                caller, act, args = pickle.loads(asked)  # noqa: S301 (of ourselves)
                with _kept_from_ending(caller) if caller != _NOBODY else nullcontext():
                    answer = act(fds, *args)
            except OSError as error:
                code = error.errno or _NO_ERRNO
            except Exception:  # noqa: BLE001 (who asked says so)
                code = _NO_ERRNO
            for fd in fds:
                os.close(fd)
            _send(control, code, answer)
    finally:
        os._exit(0)


def _send(control: socket.socket, number: int, content: bytes, fds: Sequence[LocalFd] = ()) -> None:
    control.sendall(_HEAD.pack(number, len(content)))
    for at in range(0, len(fds), _FDS_AT_ONCE):
        socket.send_fds(control, [b"f"], list(fds[at : at + _FDS_AT_ONCE]))
    control.sendall(content)


def _receive(control: socket.socket) -> tuple[int, bytes]:
    """A number and content that were sent without descriptors; EOFError, ConnectionError: the other side has ended."""
    number, size = _HEAD.unpack(_exactly(control, _HEAD.size))
    return number, _exactly(control, size)


def _receive_with_fds(control: socket.socket) -> tuple[bytes, list[LocalFd]]:
    count, size = _HEAD.unpack(_exactly(control, _HEAD.size))
    fds: list[LocalFd] = []
    while len(fds) < count:
        _, some, _, _ = socket.recv_fds(control, 1, _FDS_AT_ONCE)
        if not some:
            raise EOFError
        fds += map(LocalFd, some)
    return _exactly(control, size), fds


def _exactly(control: socket.socket, size_bytes: int) -> bytes:
    content = bytearray(size_bytes)
    left = memoryview(content)
    while left:
        count = control.recv_into(left)
        if not count:
            raise EOFError
        left = left[count:]
    return bytes(content)


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
