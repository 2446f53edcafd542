"""Open files that are in flight: in the queue of a unix socket (SCM_RIGHTS), perhaps nowhere else.

fdinfo says how many descriptors are in a queue. Looking at it gives duplicates of them; a unix socket
among them may have a queue of its own with more in it, or be in its own queue. Each is an open
file of the tree like any other; it is looked at through the duplicate.

Only a tree that stands still is looked at: SO_PEEK_OFF, which this takes, is the program's.

Source: unix(7); net/unix/af_unix.c (unix_show_fdinfo, unix_peek_fds).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence

from msgspec.structs import replace

from pipeline.errors import Blocker, Refused
from pipeline.ids import LocalFd
from pipeline.image.schema import Index
from pipeline.resources import unix_look, unix_unread
from pipeline.resources.kinds import FdView
from pipeline.resources.unix_unread import Unread

#: how the index of the open file behind a duplicate is found, who takes the duplicate over; it was
#: in the queue of the view
Adopt = Callable[[LocalFd, FdView], Index]


def count(view: FdView) -> int:
    """How many descriptors are in the queue of a unix socket, for a listener in those of its waiting clients."""
    return int(view.info.get("scm_fds", ["0"])[0])


def gather(views: Sequence[FdView], adopt: Adopt) -> Iterator[tuple[Index, list[Unread]] | Blocker]:
    """Find everything that is in flight.

    Args:
        views: of all open files, by index. `adopt` adds those that are new; they are looked at, too.
        adopt: see `Adopt`.

    Yields:
        The index of each socket with its unread messages, the files of which are indexes; or what is in the way.
    """
    at = 0
    while at < len(views):
        view = views[at]
        if count(view):
            try:
                found = _look(view, adopt)
            except Refused as refused:
                yield from refused.blockers
            else:
                if found is not None:
                    yield at, found
                    seen = sum(len(unread.files) for unread in found)
                    if seen != count(view):
                        why = f"{count(view)} descriptors are in flight in its queue, of which {seen} can be seen"
                        yield Blocker(view.subject, why, "wait until they are received", transient=True)
        at += 1


def _look(view: FdView, adopt: Adopt) -> list[Unread] | None:
    with view.as_socket() as sock:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return None  # they are in connections that only accept(2) gives
        found = unix_look.look(sock, view.subject)
    held = [[LocalFd(fd) for fd in unread.files] for unread in found]
    indexes: list[list[Index]] = []
    try:
        while held:
            indexes.append([])
            while held[0]:
                indexes[-1].append(adopt(held[0].pop(0), view))
            del held[0]
    finally:
        for fds in held:
            unix_unread.give_back(fds)
    return [replace(unread, files=tuple(files)) for unread, files in zip(found, indexes, strict=True)]
