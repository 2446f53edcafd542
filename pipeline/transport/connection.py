"""A TCP connection as a Trio stream, whose large runs of bytes go through worker threads.

A socket takes or gives some hundred kilobytes at a time, and each time is a turn of the event loop, which costs as much
as to copy them. A thread goes on with the next ones at once; and where they are encrypted, each connection has a
processor to itself. Where the network makes a pause, the thread comes back, and the event loop waits: so no
thread is lost to a peer that is silent, and who is cancelled need not wait for one.

Sources: poll(2), send(2); docs of Trio, `trio.from_thread.check_cancelled`.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from functools import partial

import trio

from pipeline.transport.handover import LARGE_BYTES

#: how long a thread waits for the network
_PATIENCE_MS = 10


class Connection(trio.abc.Stream):
    """A connected socket, which it owns; one task sends and one receives at a time.

    Raises:
        trio.BrokenResourceError: the connection broke.
        trio.ClosedResourceError: it was closed here.
    """

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._fd = stream.socket.fileno()
        self._closed = False
        #: held by threads that use `_fd`
        self._sends, self._receives = threading.Lock(), threading.Lock()

    # -- in a worker thread -------------------------------------------------------------

    def send_some(self, view: memoryview) -> int:
        """Send until all is sent or the network makes a pause; how much. For a worker thread of Trio."""
        done = 0
        with self._sends:
            while done < len(view):
                sent = self._tried(partial(os.write, self._fd, view[done:]), select.POLLOUT)
                if sent is None:
                    break
                done += sent
        return done

    def receive_into(self, view: memoryview) -> int | None:
        """Receive what is there, or comes soon; 0 at the end, None in a pause. For a worker thread of Trio."""
        with self._receives:
            return self._tried(partial(os.readv, self._fd, [view]), select.POLLIN)

    def _tried(self, act: Callable[[], int], event: int) -> int | None:
        """What `act` returns, when it can; None if that takes too long."""
        while True:
            self._require_open()
            try:
                return act()
            except BlockingIOError:
                pass
            except OSError as error:
                raise trio.BrokenResourceError(str(error)) from error
            trio.from_thread.check_cancelled()
            poll = select.poll()
            poll.register(self._fd, event)
            if not poll.poll(_PATIENCE_MS):
                return None

    def _require_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError

    # -- in the event loop --------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream`."""
        view = memoryview(data)
        while len(view) >= LARGE_BYTES:
            view = view[await trio.to_thread.run_sync(self.send_some, view) :]
            if view:
                self._require_open()
                await trio.lowlevel.wait_writable(self._stream.socket)
        if view:
            await self._stream.send_all(view)

    async def read_into(self, view: memoryview) -> int:
        """Fill `view`, if it is large and all of it comes without a pause; at least one byte, 0 at the end."""
        if len(view) < LARGE_BYTES:
            return await self._receive(view)
        count = await trio.to_thread.run_sync(self._fill, view)
        return await self._receive(view) if count is None else count

    async def _receive(self, view: memoryview) -> int:
        try:
            count: int = await self._stream.socket.recv_into(view)
        except OSError as error:
            raise trio.BrokenResourceError(str(error)) from error
        return count

    def _fill(self, view: memoryview) -> int | None:
        done = 0
        while done < len(view):
            count = self.receive_into(view[done:])
            if not count:
                return done or count
            done += count
        return done

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream`."""
        return await self._stream.receive_some(max_bytes)

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource`; a thread that uses it comes to an end first."""
        self._closed = True
        with self._sends, self._receives:
            pass
        await self._stream.aclose()
