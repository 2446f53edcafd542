"""Who gets a copy of mappings that are watched: children, which are told of by a userfaultfd.

Whoever forks waits in the kernel until that was read; so a thread does nothing but read. What it has read counts in the
same moment, so that nobody who forks is on his way while his fork does not count yet. Of a child there is a descriptor
then, by which its mappings are watched as its parent's are, and whose forks are told, too.

If this process ends, its descriptors are closed, and nobody waits; while it is stopped (SIGSTOP), who forks does.

Source: userfaultfd(2), UFFD_EVENT_FORK; dup_userfaultfd() and userfaultfd_event_wait_completion() in fs/userfaultfd.c.
"""

from __future__ import annotations

import os
import select
from threading import Lock, Thread
from typing import NamedTuple

from pipeline.ids import LocalFd
from pipeline.kernel import paging
from pipeline.kernel.paging import Forked
from pipeline.ledger import LEDGER

_ENTRY = "watch of shared memory"


class Told(NamedTuple):
    """What has happened since the last question, and is now.

    `is_calm`: nobody was forked, nothing was moved or dropped. `children`: how many there are that have memory from
    their fork, not that of another program.
    """

    is_calm: bool
    children: int


class Following:
    """Reads what userfaultfds tell of forks, moves and drops; see the module.

    Ownership: of the descriptors that it is given and told of, and of a thread, until `close`.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._first: set[LocalFd] = set()
        self._children: set[LocalFd] = set()
        self._is_calm = True
        self._ready = select.epoll()
        self._end = LocalFd(os.eventfd(0))
        LEDGER.take(_ENTRY, self._end)
        self._thread = Thread(target=self._read_all, name="forks", daemon=True)
        try:
            self._ready.register(self._end, select.EPOLLIN)
            self._thread.start()
        except BaseException:
            self._close(self._end)
            raise

    def add(self, fd: LocalFd) -> None:
        """Read what this one tells, which is owned from now on; before it watches anything.

        Raises:
            OSError: there is no room.
        """
        with self._lock:
            self._take(fd, self._first)

    def _take(self, fd: LocalFd, among: set[LocalFd]) -> None:
        LEDGER.take(_ENTRY, fd)
        try:
            self._ready.register(fd, select.EPOLLIN)
        except BaseException:
            self._close(fd)
            raise
        among.add(fd)

    def look(self) -> Told:
        """What has happened since the last look, and is now."""
        with self._lock:
            for fd in [*self._first, *self._children]:
                self._read(fd)
            for fd in [fd for fd in self._children if paging.is_gone(fd)]:
                self._drop(fd)
            told = Told(self._is_calm, len(self._children))
            self._is_calm = True
        return told

    def _read_all(self) -> None:
        while True:
            ready = {number for number, _ in self._ready.poll()}
            if self._end in ready:
                return
            with self._lock:
                for fd in (self._first | self._children) & ready:
                    self._read(fd)

    def _read(self, fd: LocalFd) -> None:
        try:
            for event in paging.read_events(fd):
                self._is_calm = False
                if isinstance(event, Forked):
                    self._take(event.fd, self._children)
        except OSError:  # there is no room for a child; who is watched no longer waits for nobody
            self._is_calm = False
            self._drop(fd)

    def _drop(self, fd: LocalFd) -> None:
        self._first.discard(fd)
        self._children.discard(fd)
        self._ready.unregister(fd)
        self._close(fd)

    @staticmethod
    def _close(fd: LocalFd) -> None:
        os.close(fd)
        LEDGER.give_back(_ENTRY, fd)

    def close(self) -> None:
        """Nobody is followed any more, nor watched; idempotent."""
        if self._end < 0:
            return
        os.eventfd_write(self._end, 1)
        self._thread.join()
        for fd in [*self._first, *self._children, self._end]:
            self._drop(fd)
        self._end = LocalFd(-1)
        self._ready.close()
