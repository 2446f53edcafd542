"""Open /dev/net/tun: the end of a tun or tap device that a program reads packets from and writes them to.

The kernel holds for a descriptor: the network it was opened in, the device it is attached to, whether its queue is
switched off; and for the device, as far as only a descriptor tells: size and byte order of vnet headers, send
buffer. All are kept. The device itself is made with the network, persistent; when its descriptors are attached
again, one that was not persistent is so no more.

Refused: a device of a network that is not the tree's, or that went to another network than the descriptor's;
a device that somebody outside of the tree is attached to; offloads, and filters for attached sockets. Not kept:
packets that wait to be read (networks lose packets), the position (it means nothing), filters by TUNSETTXFILTER and
BPF programs, which nobody can read back.

Sources: Documentation/networking/tuntap.rst; drivers/net/tun.c.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

from msgspec import Meta

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import I32, U16, U32, Index, OpenFile, PathRef, Record
from pipeline.resources import outside
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.namespaces.flags import KINDS
from pipeline.resources.paths import closed_on_error, describe, reopen
from pipeline.resources.steps import CompleteOnceCreated

_NODE = os.makedev(10, 200)
_TUNGETIFF, _TUNSETIFF, _TUNSETQUEUE, _TUNSETPERSIST = 0x800454D2, 0x400454CA, 0x400454D9, 0x400454CB
_TUNGETSNDBUF, _TUNSETSNDBUF = 0x800454D3, 0x400454D4
_TUNGETVNETHDRSZ, _TUNSETVNETHDRSZ = 0x800454D7, 0x400454D8
_TUNGETVNETLE, _TUNSETVNETLE = 0x800454DD, 0x400454DC
_TUNGETFILTER, _TUNGETDEVNETNS = 0x801054DB, 0x54E3
_IFREQ = struct.Struct("16sH22x")
_TAP, _DETACH_QUEUE, _PERSIST = 0x0002, 0x0400, 0x0800
#: what TUNSETIFF takes: tun or tap, NAPI, multiple queues, no packet information, vnet headers
_SETTABLE = 0x0003 | 0x0030 | 0x0100 | 0x1000 | 0x4000
_SIOCETHTOOL, _SIOCGSKNS = 0x8946, 0x894C
_OFFLOADS = {"checksums": 0x16, "segmentation": 0x1E}


class TunFileState(Record, frozen=True, kw_only=True):
    """`netns`: where it was opened. `device`: what it is attached to, empty for nothing; `flags`: IFF_*."""

    path: PathRef
    netns: Index
    device: Annotated[bytes, Meta(max_length=15)] = b""
    flags: U16 = 0
    header_bytes: U32 = 0
    little_endian: bool = False
    send_buffer: I32 = 0


def _attached(fd: int) -> tuple[bytes, int] | None:
    """Name and flags of the device; None if it is attached to none."""
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(fd, _TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as error:
        if error.errno == errno.EBADFD:
            return None
        raise
    return name.rstrip(b"\0"), flags


def _number(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def outsiders(
    attached: Mapping[tuple[int, bytes], int],
    views: Sequence[FdView],
    network: Callable[[LocalFd], int | None],
) -> Iterator[Blocker]:
    """Devices of the tree that somebody else is attached to.

    Args:
        attached: how many descriptors are, by network and name.
        views: all open files of the tree.
        network: the `Namespace` index of the network of one.
    """
    held = Counter(
        (network(view.local), view.info["iff"][0].encode()) for view in views if "iff" in view.info
    )
    for (netns, name), count in attached.items():
        if held[netns, name] < count:
            yield Blocker(
                f"network namespace {netns}",
                f"a process outside of the tree is attached to its device {os.fsdecode(name)}",
                "end that, or give the pid of a tree that holds it",
            )


class TunFile(CompleteOnceCreated):
    """See the module."""

    name = "tun"
    record: type[TunFileState] = TunFileState
    carried: Sequence[str] = (
        "/dev/net/tun, attached to a tun or tap device of a network of the tree, or to nothing",
    )
    refused: Sequence[str] = ("devices of external networks; offloads, filters",)
    shown_by: Sequence[str] = (
        "programs/tunnel.py",
        "test_tun_file.py",
    )

    def matches(self, view: FdView) -> bool:
        """By device number."""
        return not view.flags & os.O_PATH and stat.S_ISCHR(view.stat.st_mode) and view.stat.st_rdev == _NODE

    def check(self, view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
        """The device must be the tree's, and all of it known."""
        yield from outside.blockers(view, outside.same_file(view, scope), "the tun descriptor is held by")
        netns, attached = scope.network(view.local), _attached(view.local)
        if netns is None or (attached and netns == KINDS.index("net")):
            yield Blocker(
                view.subject,
                "is attached to a tun device of a network that is not the tree's, or may not be asked which",
                "close it, or run the tree in a network namespace of its own",
            )
            return
        if attached is None:
            return
        name, flags = attached
        if _key(view.local, _SIOCGSKNS) != _key(view.local, _TUNGETDEVNETNS):
            yield Blocker(view.subject, f"its device {os.fsdecode(name)} went to another network", "close it")
            return
        with scope.in_network(netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as asking:
            for what, command in _OFFLOADS.items():
                if _ethtool(asking, name, command):
                    yield Blocker(
                        view.subject,
                        f"offloads ({what}) of its device {os.fsdecode(name)} are on, which is not carried",
                        "start the program without them",
                    )
        if flags & _TAP and struct.unpack_from("H", fcntl.ioctl(view.local, _TUNGETFILTER, bytes(16)))[0]:
            yield Blocker(
                view.subject, "a socket filter is attached to it, which is not carried", "detach it"
            )

    def capture(self, view: FdView, scope: CaptureScope) -> TunFileState:
        """By its ioctls."""
        path, netns = scope.path(view.pid, view.link), scope.network(view.local)
        assert netns is not None
        attached = _attached(view.local)
        if attached is None:
            return TunFileState(path=path, netns=netns)
        return TunFileState(
            path=path,
            netns=netns,
            device=attached[0],
            flags=attached[1],
            header_bytes=_number(view.local, _TUNGETVNETHDRSZ),
            little_endian=_number(view.local, _TUNGETVNETLE) != 0,
            send_buffer=_number(view.local, _TUNGETSNDBUF),
        )

    def create(self, file: OpenFile, record: TunFileState, scope: CreateScope) -> LocalFd:
        """Open it in its network, and attach it.

        Raises:
            RebuildError: there is no /dev/net/tun here, or the kernel does not attach it.
        """
        return scope.in_network(record.netns, lambda: _open(file, record, scope))

    def connect(self, file: OpenFile, record: TunFileState, scope: CreateScope) -> None:
        """All are attached: a device that was not persistent ends with them from now on."""
        if record.device and not record.flags & _PERSIST:
            fcntl.ioctl(scope.file(file.index), _TUNSETPERSIST, 0)


def _open(file: OpenFile, record: TunFileState, scope: CreateScope) -> LocalFd:
    try:
        fd = reopen(file, record.path, file.flags, scope)
        if os.fstat(fd).st_rdev != _NODE:
            os.close(fd)
            raise RebuildError(f"{describe(file, record.path)} is another file here")
    except RebuildError:
        try:  # a /dev of its own, with ``nodev``: all nodes of one number are the same device
            fd = LocalFd(os.open("/dev/net/tun", file.flags & os.O_ACCMODE | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise RebuildError(f"{describe(file, record.path)} cannot be opened: {error.strerror}") from error
    if not record.device:
        return fd
    with closed_on_error(fd):
        try:
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(record.device, record.flags & _SETTABLE))
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", record.header_bytes))
            fcntl.ioctl(fd, _TUNSETVNETLE, struct.pack("i", record.little_endian))
            fcntl.ioctl(fd, _TUNSETSNDBUF, struct.pack("i", record.send_buffer))
            if record.flags & _DETACH_QUEUE:
                fcntl.ioctl(fd, _TUNSETQUEUE, _IFREQ.pack(b"", _DETACH_QUEUE))
        except OSError as error:
            name = os.fsdecode(record.device)
            raise RebuildError(
                f"{describe(file, record.path)} cannot be attached to {name}: {error.strerror}"
            ) from error
    return fd


def _key(fd: int, request: int) -> tuple[int, int]:
    """Which network a descriptor answers with."""
    found = fcntl.ioctl(fd, request)
    try:
        told = os.fstat(found)
        return told.st_dev, told.st_ino
    finally:
        os.close(found)


def _ethtool(asking: socket.socket, name: bytes, command: int) -> int:
    value = ctypes.create_string_buffer(struct.pack("II", command, 0))
    fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sQ16x", name, ctypes.addressof(value)))
    return int(struct.unpack("II", value.raw[:8])[1])


KIND = TunFile()
