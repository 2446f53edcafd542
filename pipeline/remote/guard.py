"""Somebody who watches over us: while the pages of a tree are missing, the tree does not outlive who brings them.

The kernel would show it zeros where we cannot answer any more. So a small process of its own
(`pipeline.remote.guard_program`) holds duplicates of all that watches memory, and kills the tree when we are gone,
however we went. A child that the tree forks just then may escape it: its descriptor is given on when we hear of it.
If somebody has killed that process, the tree is ours to kill when we give up.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.ledger import LEDGER
from pipeline.remote.guard_program import end_all

_PROGRAM = Path(__file__).with_name("guard_program.py")
#: a message of the program: what, and the number of a descriptor here
_KEY = struct.Struct("<ci")
_END_S = 10.0


class Guard:
    """The process; ends with `dismiss`, or kills what it watches over with `alarm`, once."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_PROGRAM)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self._channel: socket.socket | None = ours
        #: pidfds
        self._victims: list[LocalFd] = []
        LEDGER.take("guard", self._process.pid)

    @property
    def lives(self) -> bool:
        """Whether nobody has killed it."""
        return self._process.poll() is None

    def hold(self, fds: Iterable[LocalFd]) -> None:
        """Let it hold duplicates of descriptors that watch memory.

        Raises:
            RebuildError: it is gone.
        """
        self._give(b"m", list(fds))

    def let_go(self, fds: Iterable[LocalFd]) -> None:
        """Let it close its duplicates of such, soon; to be said while ours are open."""
        with suppress(RebuildError):  # it is gone, and they are with it
            for fd in fds:
                self._send(_KEY.pack(b"c", fd), [])

    def watch_over(self, pids: Iterable[HostPid]) -> None:
        """Tell it whom to kill; raises as `hold`."""
        for pid in pids:
            self._victims.append(LocalFd(os.pidfd_open(pid)))
            self._give(b"p", self._victims[-1:])

    def _give(self, what: bytes, fds: list[LocalFd]) -> None:
        for fd in fds:
            self._send(_KEY.pack(what, fd), [fd])

    def _send(self, message: bytes, fds: list[LocalFd]) -> None:
        assert self._channel is not None
        try:
            socket.send_fds(self._channel, [message], fds)
        except OSError as error:
            raise RebuildError(f"the guard of a tree with missing pages is gone: {error.strerror}") from error

    def dismiss(self) -> None:
        """All pages are there: it lets go of all it holds, and ends; idempotent."""
        if self._channel is not None:
            with suppress(OSError):  # it is gone already
                self._channel.send(b"d")
            self._end()

    def alarm(self) -> None:
        """Everybody is killed, and it ends; idempotent, and nothing after `dismiss`."""
        if self._channel is not None:
            self._end(self._kill)

    def _kill(self) -> None:
        """What it was to do, where it could not."""
        if self._process.returncode:
            end_all(list(self._victims))

    def _end(self, last: Callable[[], None] = lambda: None) -> None:
        channel, self._channel = self._channel, None
        assert channel is not None
        channel.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        LEDGER.give_back("guard", self._process.pid)
        try:
            last()
        finally:
            while self._victims:
                os.close(self._victims.pop())
