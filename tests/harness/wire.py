"""A piece of network between two programs: slow if that is wished, and it can be cut and mended."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Self

_PIECE_BYTES = 64 << 10


class Wire:
    """Forwards connections to an address; a context manager.

    Args:
        target: HOST:PORT.
        bytes_per_s: how fast each connection is, in each direction.
        limits: by the number of a connection, from 0: it ends when so many bytes have gone to the target, and what
            comes behind them is lost.
    """

    def __init__(self, target: str, bytes_per_s: float, limits: Mapping[int, int] | None = None) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self.bytes_per_s = bytes_per_s
        self._limits = dict(limits or {})
        self._count = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_cut = False
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join()

    def cut(self) -> None:
        """End all connections, and let no new one through."""
        with self._lock:
            self._is_cut = True
            while self._ends:
                end = self._ends.pop()
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def mend(self) -> None:
        """Let new connections through again."""
        with self._lock:
            self._is_cut = False

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut:
                    end.close()
                    continue
                try:
                    other = socket.create_connection(self._target)
                except OSError:
                    end.close()
                    continue
                self._ends += [end, other]
            self._start(self._forward, end, other, self._limits.get(self._count, sys.maxsize))
            self._start(self._forward, other, end, sys.maxsize)
            self._count += 1

    def _forward(self, source: socket.socket, target: socket.socket, limit: int) -> None:
        with suppress(OSError):
            while data := source.recv(_PIECE_BYTES):
                target.sendall(data[:limit])
                limit -= len(data)
                if limit <= 0:
                    source.shutdown(socket.SHUT_RDWR)
                    break
                time.sleep(len(data) / self.bytes_per_s)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
