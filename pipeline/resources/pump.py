"""What comes out of a given pipe, behind bytes that a tree had not read yet.

Bytes that were unread in an external pipe have to come out before those of the pipe that takes its place, and nobody
can put bytes in front of others in a pipe that somebody writes to. So the tree reads from a pipe of its own, which
begins with them, and a small process passes on what comes: it ends with the given pipe, or when nobody reads any
more, so that each side sees the end of the other.

It begins only when the tree runs: until then nothing is taken out of what was given. It is nobody's child, because the
restorer may end before the tree does.

Source: splice(2), pipe(7).
"""

from __future__ import annotations

import errno
import os
import select
from contextlib import suppress

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.kernel.forking import fork_deaf
from pipeline.kernel.syscalls import PRCTL, prctl
from pipeline.ledger import LEDGER

COMM = b"pipeline-pump"
_MOST_BYTES = 1 << 20


class Pump:
    """From `source`, any file that can be read, into a new pipe, whose end to read from is `reader`.

    Ownership: takes `source`; holds both until `start` or `close`, `reader` until `close`.
    """

    def __init__(self, source: LocalFd) -> None:
        self._source = source
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self.reader, self._writer = LocalFd(reader), LocalFd(writer)
        LEDGER.take("pump", self.reader)

    def start(self) -> None:
        """Let it run by itself.

        Raises:
            RebuildError: no process can be made.
        """
        try:
            between = fork_deaf()
        except OSError as error:
            raise _no_process(error) from error
        if between:
            _, status = os.waitpid(between, 0)
            if code := os.waitstatus_to_exitcode(status):
                raise _no_process(OSError(max(0, code), os.strerror(max(0, code))))
            return
        code = 0
        try:
            if os.fork() == 0:
                _become_pump(self._source, self._writer)
        except OSError as error:
            code = error.errno or errno.EAGAIN
        finally:
            os._exit(code)

    def close(self) -> None:
        """Close everything here; idempotent."""
        if self.reader >= 0:
            for fd in (self._source, self._writer, self.reader):
                os.close(fd)
            LEDGER.give_back("pump", self.reader)
            self.reader = LocalFd(-1)


def _no_process(error: OSError) -> RebuildError:
    return RebuildError(f"what a given pipe says cannot be passed on: {error.strerror}")


def _become_pump(source: LocalFd, sink: LocalFd) -> None:
    with suppress(OSError):
        os.setsid()
        os.chdir("/")
        prctl(PRCTL.SET_NAME, COMM + b"\0")
        kept = sorted((source, sink))
        os.closerange(0, kept[0])
        os.closerange(kept[0] + 1, kept[1])
        os.closerange(kept[1] + 1, 1 << 20)
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(sink, 0)
        while True:
            events = dict(poll.poll())
            if events.get(sink, 0) & select.POLLERR:
                return
            if events.get(source):
                try:
                    if not os.splice(source, sink, _MOST_BYTES):
                        return
                except BlockingIOError:
                    continue
