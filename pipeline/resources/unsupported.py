"""What no other kind carries: always refused, each with its reason and a remedy.

This kind stands last in the registry and matches everything, so that an open file of
a sort nobody thought of is refused by name and never lost.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence

from pipeline.errors import Blocker
from pipeline.kernel.statfs import Magic
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.refusing import AlwaysRefused

#: start of the link -> (what it is, what to do)
_BY_LINK: Sequence[tuple[bytes, str, str]] = (
    (b"anon_inode:[perf_event]", "perf events count on this host's processors", "stop the measurement"),
    (b"anon_inode:bpf", "BPF programs and maps live in this kernel", "unload them"),
    (b"anon_inode:btf", "BPF type information lives in this kernel", "close it"),
    (b"anon_inode:kvm", "virtual machines of KVM cannot be carried", "migrate the guest with its own tools"),
    (
        b"anon_inode:seccomp notify",
        "a seccomp listener answers calls of other processes",
        "run the supervisor outside",
    ),
    (b"anon_inode:[landlock", "Landlock rulesets cannot be read back", "close it"),
    (b"anon_inode:[fscontext]", "a mount that is being configured cannot be read back", "finish the mount"),
    (b"anon_inode:sync_file", "fences of a graphics device cannot be carried", "close the device"),
    (b"anon_inode:dmabuf", "buffers of a device cannot be carried", "close the device"),
    (b"/dmabuf:", "buffers of a device cannot be carried", "close the device"),
    (b"anon_inode:[vfio", "VFIO devices cannot be carried", "detach the device"),
    (b"/secretmem", "secret memory cannot be read from outside", "use memfd_create instead"),
    (b"socket:[", "this kind of socket is not carried", "close it"),
)


_IO_URING = b"anon_inode:[io_uring]"
_WITHOUT_IO_URING = (
    "start it without io_uring: sysctl kernel.io_uring_disabled=2, MariaDB innodb_use_native_aio=0, "
    "PostgreSQL io_method=worker, Node UV_USE_IO_URING=0"
)
_U32 = 0xFFFF_FFFF


class Unsupported(AlwaysRefused):
    """See the module."""

    name = "unsupported"
    refused: Sequence[str] = (
        "io_uring, perf, BPF, KVM, secret memory",
        "devices with state, block devices, whatever is not known",
    )
    shown_by: Sequence[str] = ("resources/test_places.py",)

    def matches(self, view: FdView) -> bool:
        """Everything."""
        return True

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """Always one blocker."""
        reason, remedy = _described(view) or _reason(view)
        yield Blocker(view.subject, reason, remedy)


def _described(view: FdView) -> tuple[str, str] | None:
    """What fdinfo tells of kinds whose user wants to know more: who it is, and what is going on."""

    def number(key: str) -> int:
        return int(view.info.get(key, ["0"])[0], 0)

    who = outside.name_of(view.pid)
    if view.link == _IO_URING:
        submitted = number("SqTail") - number("CachedSqHead") & _U32
        unread = number("CachedCqTail") - number("CqHead") & _U32
        reason = (
            f"{who} uses an io_uring: {number('SqMask') + 1} requests ({submitted} not taken yet, "
            f"{unread} results unread, {number('UserFiles')} files and {number('UserBufs')} buffers registered); the "
            f"kernel's own counters, at {number('CachedSqHead')} and {number('CachedCqTail')}, cannot be set, nor can "
            "what is in flight be seen"
        )
        return reason, _WITHOUT_IO_URING
    return None


def _reason(view: FdView) -> tuple[str, str]:
    for start, reason, remedy in _BY_LINK:
        if view.link.startswith(start):
            return reason, remedy
    mode = view.stat.st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        number = f"{os.major(view.stat.st_rdev)}:{os.minor(view.stat.st_rdev)}"
        kind = "character" if stat.S_ISCHR(mode) else "block"
        return f"{kind} device {number} has a state of its own that cannot be carried", "close it"
    magic = view.filesystem
    if magic == Magic.SECRETMEM:
        return "secret memory cannot be read from outside", "use memfd_create instead"
    if magic == Magic.HUGETLBFS:
        return (
            "files of hugetlbfs are not carried",
            "use huge pages without a file (MAP_ANONYMOUS, or a memfd)",
        )
    return "this kind of open file is not known", "close it"


KIND = Unsupported()
