"""All kinds of open files, in the order in which they are asked whether one is theirs.

The support matrix in the docs and in ``check`` is printed from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from pipeline.errors import ImageError
from pipeline.resources import device, directory, epoll, eventfd, pipes, regular
from pipeline.resources.kinds import FdView, FileKind

#: kinds that most trees have: with no others, a restore does not pay for the modules of the rest
_COMMON: tuple[FileKind[Any], ...] = (
    regular.KIND,
    directory.KIND,
    pipes.KIND,
    device.KIND,
    eventfd.KIND,
    epoll.KIND,
)
#: kinds that see what is done to files
WATCHERS = frozenset({"inotify", "fanotify"})


@cache
def kinds() -> tuple[FileKind[Any], ...]:
    """Every kind; the last one matches whatever is left, and refuses it."""
    from pipeline.resources import (
        external_end,
        fanotify,
        fifo,
        inotify,
        kernel_files,
        memfd,
        mqueue,
        namespace_file,
        netlink_socket,
        opath,
        other_socket,
        packet_socket,
        pidfd,
        pty,
        raw_socket,
        signalfd,
        tcp_socket,
        timerfd,
        tun_file,
        udp_socket,
        unix_socket,
        unnamed,
        unsupported,
        userfault,
    )

    return (
        opath.KIND,
        memfd.KIND,
        namespace_file.KIND,
        kernel_files.KIND,
        unnamed.KIND,
        regular.KIND,
        directory.KIND,
        pipes.KIND,
        fifo.KIND,
        mqueue.KIND,
        unix_socket.KIND,
        tcp_socket.KIND,
        udp_socket.KIND,
        raw_socket.KIND,
        packet_socket.KIND,
        netlink_socket.KIND,
        other_socket.KIND,
        pty.KIND,
        device.KIND,
        tun_file.KIND,
        eventfd.KIND,
        epoll.KIND,
        timerfd.KIND,
        signalfd.KIND,
        pidfd.KIND,
        inotify.KIND,
        external_end.KIND,
        fanotify.KIND,
        userfault.KIND,
        unsupported.KIND,
    )


def kind_of(view: FdView) -> FileKind[Any]:
    """The kind that carries (or refuses) an open file."""
    return next(kind for kind in kinds() if kind.matches(view))


@cache
def kind_named(name: str) -> FileKind[Any]:
    """The kind of a record.

    Raises:
        ImageError: an image names a kind that this version does not know.
    """
    for kind in _common_first():
        if kind.name == name:
            return kind
    raise ImageError(f"the image holds an open file of kind {name!r}, which this version does not know")


def _common_first() -> Iterator[FileKind[Any]]:
    yield from _COMMON
    yield from kinds()
