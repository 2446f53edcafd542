"""tun and tap devices: made by an open /dev/net/tun, which then lets go of them.

They are made persistent, so that they are there when descriptors are attached (`pipeline.resources.tun_file`).

Kept besides what every device has: tun or tap, packet information, vnet headers, multiple queues, and the user and
the group that may attach to it, who go through the forest: the kernel tells and takes them as the user namespace of
whoever asks knows them.

Refused by name: another link type than is usual. Only an attached descriptor is told the size of vnet headers,
offloads and filters: without one they are not kept.

Source: Documentation/networking/tuntap.rst; include/uapi/linux/if_tun.h; drivers/net/tun.c.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable, Iterator, Mapping

from pipeline.ids import LocalFd
from pipeline.image.schema import Id
from pipeline.kernel.syscalls import CLONE
from pipeline.userns.forest import IdKind
from pipeline.userns.visit import visit

_OWNER, _GROUP, _TYPE, _PI, _VNET_HDR, _PERSIST, _MULTI_QUEUE, _QUEUES, _DISABLED = range(1, 10)
#: attributes of IFLA_INFO_DATA that are kept as they are
KEPT = frozenset({_TYPE, _PI, _VNET_HDR, _MULTI_QUEUE})
_TAP = 2
_IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0100, 0x1000, 0x4000
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
_TUNSETIFINDEX = 0x400454DA
_ARPHRD_ETHER, _ARPHRD_NONE = 1, 0xFFFE

#: a number here, of an id of the image
Number = Callable[[Id, IdKind], int | None]


def _value(data: Mapping[int, bytes], kind: int) -> int:
    return int.from_bytes(data.get(kind, b""), "little")


def blockers(name: str, link_type: int, data: Mapping[int, bytes]) -> Iterator[tuple[str, str]]:
    """What stands in the way of carrying a device, and what can be done.

    Args:
        link_type: ARPHRD_*.
        data: attributes of IFLA_INFO_DATA.
    """
    what = f"{'tap' if _value(data, _TYPE) == _TAP else 'tun'} device {name}"
    if link_type != (_ARPHRD_ETHER if _value(data, _TYPE) == _TAP else _ARPHRD_NONE):
        yield f"{what} of link type {link_type}, which is not carried", "remove it"


def attached(carrier: bool, data: Mapping[int, bytes]) -> int:
    """How many descriptors are attached to a device.

    Args:
        carrier: whether it has one: devices with one queue do while a descriptor is attached.
        data: attributes of IFLA_INFO_DATA.
    """
    if _value(data, _MULTI_QUEUE):
        return _value(data, _QUEUES) + _value(data, _DISABLED)
    return int(carrier)


def ids(data: Mapping[int, bytes]) -> tuple[int | None, int | None]:
    """The uid and gid that may attach, as the reader's user namespace knows them; None: anybody who is privileged."""
    uid, gid = (_value(data, kind) if kind in data else None for kind in (_OWNER, _GROUP))
    return uid, gid


def make(
    network: LocalFd, name: bytes, index: int, data: Mapping[int, bytes], uid: int | None, gid: int | None
) -> None:
    """Make a persistent device in a network.

    Args:
        network: stays the caller's.
        data: what was kept of its attributes.
        uid, gid: who may attach, as we know them.

    Raises:
        OSError: it cannot be made.
    """
    flags = _TAP if _value(data, _TYPE) == _TAP else 1
    flags |= 0 if _value(data, _PI) else _IFF_NO_PI
    flags |= _IFF_VNET_HDR if _value(data, _VNET_HDR) else 0
    flags |= _IFF_MULTI_QUEUE if _value(data, _MULTI_QUEUE) else 0

    def work() -> bytes:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _TUNSETIFINDEX, struct.pack("I", index))
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name, flags))
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
            for request, one in ((_TUNSETOWNER, uid), (_TUNSETGROUP, gid)):
                if one is not None:
                    fcntl.ioctl(fd, request, one)
        finally:
            os.close(fd)
        return b""

    visit([(network, CLONE.NEWNET)], work)
