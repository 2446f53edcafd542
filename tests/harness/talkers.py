"""Clients outside of a tree, on TCP connections that have to last: each asks numbers and checks every answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tests.harness.networks import within

PORT = 9
_PATIENCE_S = 60.0


class Talkers:
    """Connections that talk in threads of their own; `errors` tells what went wrong.

    Args:
        path: of the network they are in.
        addresses: one connection to each.
    """

    def __init__(self, path: str, addresses: Sequence[str]) -> None:
        self.errors: list[str] = []
        self.answers = [0] * len(addresses)
        self._end = threading.Event()
        self._socks = within(path, lambda: [self._connect(address) for address in addresses])
        self._threads = [
            threading.Thread(target=self._talk, args=(n, sock), daemon=True)
            for n, sock in enumerate(self._socks)
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _connect(address: str) -> socket.socket:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return socket.create_connection((address, PORT), _PATIENCE_S)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _talk(self, n: int, sock: socket.socket) -> None:
        number = 0
        try:
            while not self._end.is_set():
                number += 1
                sock.sendall(b"%08d" % number)
                answer = b""
                while len(answer) < 8:
                    piece = sock.recv(8 - len(answer))
                    if not piece:
                        raise OSError("the connection has ended")
                    answer += piece
                if int(answer) != 3 * number % 100_000_000:
                    raise OSError(f"{answer!r} to {number}")
                self.answers[n] = number
                time.sleep(0.001)
        except OSError as error:
            self.errors.append(f"connection {n}, word {number}: {error}")

    def go_on(self) -> None:
        """Every connection has a few answers more."""
        goals = [answers + 5 for answers in self.answers]
        deadline = time.monotonic() + _PATIENCE_S
        while any(now < goal for now, goal in zip(self.answers, goals, strict=True)):
            assert not self.errors, self.errors
            assert time.monotonic() < deadline, f"{self.answers} of {goals}"
            time.sleep(0.01)

    def close(self) -> None:
        self._end.set()
        for sock, thread in zip(self._socks, self._threads, strict=True):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()
            sock.close()


@contextmanager
def talkers(path: str, addresses: Sequence[str]) -> Iterator[Talkers]:
    found = Talkers(path, addresses)
    try:
        found.go_on()
        yield found
        found.go_on()
        assert not found.errors, found.errors
    finally:
        found.close()
