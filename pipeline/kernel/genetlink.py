"""Families of generic netlink and their groups, whose numbers a kernel gives as they register.

Source: Documentation/networking/generic_netlink, include/uapi/linux/genetlink.h; net/netlink/genetlink.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable

import msgspec

from pipeline.kernel.rtnetlink import Netlink, attributes, socket_of

_NETLINK_GENERIC = 16
_CONTROL = 16
_GET_FAMILY = 3
_FAMILY_ID, _FAMILY_NAME, _GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2
_HEADER_BYTES = 4


class Family(msgspec.Struct, frozen=True):
    """One family: its number, and the numbers of its groups by name."""

    number: int
    groups: dict[str, int] = msgspec.field(default_factory=dict)


def families(made: Callable[[Callable[[], socket.socket]], socket.socket]) -> dict[str, Family]:
    """Every family that a network knows, by name.

    Args:
        made: makes the netlink socket in the network namespace that is asked.
    """
    found = {}
    with Netlink(made(lambda: socket_of(_NETLINK_GENERIC))) as link:
        for message in link.dump(_CONTROL, struct.pack("<BBH", _GET_FAMILY, 1, 0)):
            told = attributes(message[_HEADER_BYTES:])
            groups = {}
            for group in attributes(told.get(_GROUPS, b"")).values():
                inner = attributes(group)
                groups[_text(inner[_GROUP_NAME])] = int.from_bytes(inner[_GROUP_ID][:4], "little")
            number = int.from_bytes(told[_FAMILY_ID][:2], "little")
            found[_text(told[_FAMILY_NAME])] = Family(number, groups)
    return found


def _text(value: bytes) -> str:
    return value.split(b"\0")[0].decode("ascii", "replace")
