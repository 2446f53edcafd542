"""Where events and progress go: written at once or kept for a moment, never waited for.

Whoever reads may be slow, or gone. A pipe or a terminal is opened once more for this, without blocking: the flag
belongs to the opening, so that others who write there do not notice. What does not fit is kept, up to
`MOST_BYTES`; what does not fit there is dropped and counted.
"""

from __future__ import annotations

import io
import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress

#: what is kept for a slow reader
MOST_BYTES = 1 << 20
#: at the end, how long a reader is waited for
PATIENCE_S = 1.0


class Outlet:
    """Writes whole lines to a descriptor; owns what it opened.

    Args:
        fd: where to; it stays the caller's.
    """

    def __init__(self, fd: int) -> None:
        self._write: Callable[[bytes], int] = self._write_plain
        self._own = -1
        mode = os.fstat(fd).st_mode
        if stat.S_ISSOCK(mode):
            self._own = os.dup(fd)
            self._write = self._send
        elif stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            try:
                self._own = os.open(
                    f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
                )
            except OSError:  # somebody else's: ask before every write
                self._write = self._write_asked
        if self._own < 0:
            self._own = os.dup(fd)
        self._kept = bytearray()
        self._broken = False
        #: lines that were dropped since this was last set to 0
        self.dropped = 0

    @property
    def keeps_up(self) -> bool:
        """Nothing waits to be written."""
        return not self._kept

    def put(self, line: bytes) -> None:
        """Write it, keep it or drop it; never blocks, never raises."""
        if self._broken:
            return
        if len(self._kept) + len(line) > MOST_BYTES:
            self._flush()
        if len(self._kept) + len(line) > MOST_BYTES:
            self.dropped += 1
            return
        self._kept += line
        self._flush()

    def close(self) -> None:
        """Give a reader a moment for what is kept, then let go; idempotent."""
        if self._own < 0:
            return
        with suppress(OSError):
            waiting = select.poll()
            waiting.register(self._own, select.POLLOUT)
            while self._kept and not self._broken and waiting.poll(1e3 * PATIENCE_S):
                before = len(self._kept)
                self._flush()
                if len(self._kept) == before:
                    break
        os.close(self._own)
        self._own = -1
        self._broken = True

    def _flush(self) -> None:
        try:
            while self._kept:
                del self._kept[: self._write(bytes(self._kept[:65536]))]
        except BlockingIOError:
            return
        except OSError:  # the reader is gone, or the disk is full
            self._broken = True
            self._kept.clear()

    def _write_plain(self, data: bytes) -> int:
        return os.write(self._own, data)

    def _send(self, data: bytes) -> int:
        with socket.socket(fileno=os.dup(self._own)) as end:
            return end.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def _write_asked(self, data: bytes) -> int:
        ready = select.poll()
        ready.register(self._own, select.POLLOUT)
        if not ready.poll(0):
            raise BlockingIOError
        # a pipe that is ready has room for so much
        return os.write(self._own, data[: select.PIPE_BUF])


class Screen(io.TextIOBase):
    """A terminal behind an outlet, for what draws on it; the outlet stays its owner's."""

    encoding = "utf-8"

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def isatty(self) -> bool:
        """It is one."""
        return True

    def write(self, text: str) -> int:
        """See `Outlet.put`."""
        self._outlet.put(text.encode(errors="backslashreplace"))
        return len(text)

    @property
    def keeps_up(self) -> bool:
        """All that was drawn is on the terminal."""
        self._outlet.put(b"")  # it may have room by now
        return self._outlet.keeps_up
