"""Asking something inside a namespace: a visitor joins it, looks, and answers.

Only the visitor changes namespaces. It is a thread where it can be, which costs a tenth of a
millisecond; only a process of one thread may join a user or time namespace, so then it is a child. A child
does nothing but system calls between fork and exit, so that it is safe to fork where other
threads run.

Source: setns(2).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from queue import SimpleQueue
from typing import Self, TypeVar

from pipeline.ids import LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.forking import answer_of_child
from pipeline.kernel.syscalls import CLONE, setns, unshare
from pipeline.ledger import LEDGER

_CHUNK_BYTES = 1 << 16
#: SCM_MAX_FD
_MAX_FETCHED = 253

#: descriptor and CLONE_NEW* flag of every namespace that a visitor joins, in this order
Way = Sequence[tuple[int, int]]
T = TypeVar("T")


def as_owner(namespace: LocalFd, kind: int, owned: bool, fds: ExitStack) -> Way:
    """The way into a namespace with the ids and capabilities of the user namespace that owns it.

    Args:
        namespace: stays the caller's; `kind` is its CLONE_NEW* flag.
        owned: by another user namespace than our own, which joins it first.
        fds: closes what is opened.
    """
    way = [(int(namespace), int(kind))]
    if owned:
        owner = nsfs.owner(namespace)
        fds.callback(os.close, owner)
        way.insert(0, (int(owner), int(CLONE.NEWUSER)))
    return way


def visit(namespaces: Way, look: Callable[[], bytes], *, alone: bool = False) -> bytes:
    """Join namespaces in a visitor and return what `look` returns there.

    Args:
        namespaces: (descriptor, CLONE_NEW* flag), joined in this order.
        look: runs in the visitor; must not use locks of other threads. It may unshare namespaces.
        alone: the visitor must be a process of one thread, because of a time namespace.

    Raises:
        OSError: joining or looking failed, with the errno.
    """
    if alone or any(flag & CLONE.NEWUSER for _, flag in namespaces):
        return _by_child(namespaces, look)
    return _by_thread(namespaces, look)


def fetch(namespaces: Way, make: Callable[[], int]) -> LocalFd:
    """Join namespaces in a visitor and return the descriptor that `make` makes there, such as a socket.

    Raises:
        OSError: joining or making failed, with the errno.
    """
    if not any(flag & CLONE.NEWUSER for _, flag in namespaces):
        return LocalFd(int(_by_thread(namespaces, lambda: b"%d" % make())))
    (made,) = fetch_all(namespaces, lambda: [make()])
    return made


def fetch_all(namespaces: Way, make: Callable[[], Sequence[int]]) -> list[LocalFd]:
    """As `fetch`, for some descriptors, made in a visitor that is a process; in the order of `make`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:

        def hand_over() -> bytes:
            socket.send_fds(theirs, [b"x"], make())
            return b""

        _by_child(namespaces, hand_over)
        _, made, _, _ = socket.recv_fds(ours, 1, _MAX_FETCHED, socket.MSG_CMSG_CLOEXEC)
    return [LocalFd(fd) for fd in made]


def become(uid: int, gid: int) -> None:
    """Take ids to make files and other objects with; for a visitor that is a process, in its user namespace.

    It keeps all capabilities: its ids are either these, or have no number there.
    """
    if os.getgid() != gid:
        os.setresgid(gid, gid, gid)
    if os.getuid() != uid:
        os.setresuid(uid, uid, uid)


def read_file(path: str | bytes) -> bytes:
    """A whole file, by plain system calls: for what runs in a visitor."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, _CHUNK_BYTES), b""))
    finally:
        os.close(fd)


class Visitor:
    """A visitor that is a thread, and stays until `close`, to be asked for one thing after the other.

    Args:
        namespaces: neither user nor time namespaces.

    Raises:
        OSError: joining failed, with the errno.
    """

    def __init__(self, namespaces: Way) -> None:
        self._acts: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="visitor")
        self._thread.start()
        LEDGER.take("visitor", id(self))
        try:
            self.do(lambda: _join(namespaces))
        except BaseException:
            self.close()
            raise

    def _run(self) -> None:
        while (act := self._acts.get()) is not None:
            try:
                self._results.put((act(), None))
            except BaseException as error:  # noqa: BLE001 (raised where it was asked)
                self._results.put((None, error))

    def do(self, act: Callable[[], T]) -> T:
        """What `act` returns there; raises what it raises."""
        self._acts.put(act)
        result, error = self._results.get()
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Let it end; idempotent."""
        if self._thread.is_alive():
            self._acts.put(None)
            self._thread.join()
            LEDGER.give_back("visitor", id(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _join(namespaces: Way) -> None:
    unshare(CLONE.FS)  # the root directory that follows a mount namespace is this thread's own
    for fd, flag in namespaces:
        setns(fd, flag)


def _by_thread(namespaces: Way, look: Callable[[], bytes]) -> bytes:
    with Visitor(namespaces) as visitor:
        return visitor.do(look)


def _by_child(namespaces: Way, look: Callable[[], bytes]) -> bytes:
    def look_there() -> bytes:
        for fd, flag in namespaces:
            setns(fd, flag)
        return look()

    return answer_of_child(look_there)
