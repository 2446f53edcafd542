"""A connection that a test can shut: what goes to a server waits from some byte on until the valve is opened.

So a test knows where a migration is, and need not be lucky with its timing: as long as the valve is shut, no more than
what fits into the buffers in between has been read of the tree.
"""

from __future__ import annotations

import socket
import threading
from types import TracebackType
from typing import Self

_PIECE_BYTES = 1 << 16
_PATIENCE_S = 300.0


class Valve:
    """Relays connections to `address` (HOST:PORT); shuts once when `after_bytes` have gone there.

    Ownership: sockets and threads until the end of the block.
    """

    def __init__(self, address: str, after_bytes: int) -> None:
        host, _, port = address.rpartition(":")
        self._to = host, int(port)
        self._left_bytes = after_bytes
        self._shut, self._open = threading.Event(), threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for one in self._sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the other end was quicker
        for thread in self._threads[1:]:
            thread.join()
        for one in [self._listener, *self._sockets]:
            one.close()

    def wait_until_shut(self) -> None:
        """So many bytes have gone through, and no more will."""
        assert self._shut.wait(_PATIENCE_S), "the valve has not shut: too little was sent"

    def open(self) -> None:
        """Let the rest through."""
        self._open.set()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(self._to)
            except OSError:  # the server has ended: so does the connection
                near.shutdown(socket.SHUT_RDWR)
                continue
            self._sockets.append(far)
            for ends in ((near, far, True), (far, near, False)):
                self._threads.append(threading.Thread(target=self._pump, args=ends))
                self._threads[-1].start()

    def _pump(self, source: socket.socket, to: socket.socket, counts: bool) -> None:
        try:
            while piece := source.recv(_PIECE_BYTES):
                to.sendall(piece)
                if counts and self._left_bytes > 0:
                    self._left_bytes -= len(piece)
                    if self._left_bytes <= 0:
                        self._shut.set()
                        self._open.wait()
            to.shutdown(socket.SHUT_WR)
        except OSError:
            for one in (source, to):
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # it is gone already
