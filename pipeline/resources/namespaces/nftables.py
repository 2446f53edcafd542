"""nftables rules of a network of the tree: kept as the text that nft(8) prints, and loaded again by it.

The kernel's own messages have a format for every expression; nft knows them all, and its text is a language
that it reads, too. So a visitor runs `nft -n list ruleset` in the network; counters, quotas, sets and maps with
their elements, their timeouts and what is left of them come with the text. Numbers are printed, not names: what
/etc calls a mark is not the same on every host.

That a text can be read does not mean that nothing is lost on the way: rules of iptables-nft may hold
matches that nft cannot say. So the text is tried at once: it is loaded into a network made for
the occasion, with devices of the same names and indexes, and has to read the same there.

Ids of `meta skuid` and `skgid` are numbers in the user namespace that owns the network (not in that of who loads
or reads the rules), so inside of the tree they stay true wherever it is put. A network that the surroundings' user
namespace owns is another matter: where its ids are moved, the rules would mean others.

Refused by name: rules without an nft that could print them, what reads differently when loaded again, tables
that belong to a netlink socket (`flags owner`). Not kept: handles, the connection tracking table.

Sources: nft(8); net/netfilter/nft_meta.c `nft_meta_get_eval_skugid`; include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgpack

from pipeline.errors import Blocker
from pipeline.kernel import rtnetlink
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.nfnetlink import LOOKING
from pipeline.kernel.rtnetlink import IFLA, IFLA_INFO, RTM, Netlink, attribute, attributes
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl, syscall, unshare
from pipeline.userns.visit import Way, read_file, visit

_GETTABLE = 10 << 8 | 1
_TABLE_NAME, _TABLE_FLAGS = 1, 2
_TABLE_OWNED = 2
#: where it is, even if the PATH of a plain user does not say so
_SBIN = "/usr/sbin:/sbin:/usr/local/sbin"
_CAP_NET_ADMIN = 12
_CAPABILITY_VERSION_3 = 0x20080522
_AMBIENT_RAISE = 2
#: indexes of the other ends of devices that stand for those of the tree
_STAND_IN_PEERS = 0x3000_0000
_STRING = re.compile(rb'"[^"]*"')
#: what grows or shrinks between two looks
_TICKING = re.compile(rb"\b(expires|last used) \S+")
#: what we have put there ourselves for the time of the look
_LOCK = re.compile(rb"^table inet " + LOOKING.encode() + rb".*?^\}\n", re.MULTILINE | re.DOTALL)
_OF_SOCKETS = re.compile(rb"\bsk[ug]id\b")

#: index and name of a device
Device = tuple[int, bytes]


class NotCarriedError(Exception):
    """Rules that cannot be carried: why, and what can be done."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


def find() -> str | None:
    """The path of nft; None where it is not installed."""
    return shutil.which("nft", path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")


def capture(filters: Netlink, way: Way, devices: Sequence[Device]) -> bytes:
    """The rules of a network, as text that has been tried; nothing, if there are none.

    Args:
        filters: a socket of NETLINK_NETFILTER in the network.
        way: what a visitor joins to be in it.
        devices: all that are carried.

    Raises:
        NotCarriedError: they cannot be made again.
        OSError: a visitor cannot go there.
    """
    try:
        tables = [attributes(content[4:]) for content in filters.dump(_GETTABLE, bytes(4))]
    except OSError:  # EOPNOTSUPP or EINVAL: there is no nftables in this kernel
        return b""
    tables = [table for table in tables if not table[_TABLE_NAME].startswith(LOOKING.encode())]
    for table in tables:
        if int.from_bytes(table.get(_TABLE_FLAGS, b""), "big") & _TABLE_OWNED:
            name = table[_TABLE_NAME].rstrip(b"\0").decode()
            raise NotCarriedError(
                f"nftables table {name}, which belongs to a netlink socket", "end the program that holds it"
            )
    if not tables:
        return b""
    nft = find()
    if nft is None:
        raise NotCarriedError("nftables rules, and there is no nft here to read them", "install nftables")

    def look() -> bytes:
        _keep_capabilities()
        packed: bytes = msgpack.packb(_read_and_try(nft, devices))
        return packed

    text, complaint = msgpack.unpackb(visit(way, look))
    if complaint:
        raise NotCarriedError(f"nftables rules that nft cannot make again: {complaint}", "remove them")
    return bytes(text)


def create(text: bytes, way: Way) -> str | None:
    """Load rules into a network whose devices are there; what nft says against it, or None.

    Raises:
        OSError: a visitor cannot go there.
    """
    nft = find()
    if nft is None:
        return "there is no nft here (install nftables)"

    def load() -> bytes:
        status, _, complaint = _run(nft, ["-f", "-"], text)
        return complaint or b"it failed" if status else b""

    return _first_line(visit(way, load)) or None


def check_here(index: int, text: bytes, ids_are_same: bool) -> Iterator[Blocker]:
    """Whether rules can be loaded here, before anything is made.

    Args:
        index: of the network.
        ids_are_same: the numbers of uids and gids in the user namespace that owns the network are what they were.
    """
    subject = f"network namespace {index}"
    if text and find() is None:
        yield Blocker(
            subject, "has nftables rules, and there is no nft here to load them", "install nftables"
        )
    if _OF_SOCKETS.search(_STRING.sub(b"", text)) and not ids_are_same:
        yield Blocker(
            subject,
            "has nftables rules for uids or gids (skuid, skgid), and --map gives these ids other numbers here",
            "restore with --map same",
        )


def _read_and_try(nft: str, devices: Iterable[Device]) -> tuple[bytes, str]:
    """The rules of the network of the caller, and what is lost when they are loaded again; it ends up in a new one."""
    status, text, complaint = _run(nft, ["-n", "list", "ruleset"])
    if status:
        return b"", _first_line(complaint) or "it cannot read them"
    text = _LOCK.sub(b"", text)
    unshare(CLONE.NEWNET)
    names = set(_STRING.findall(text))
    _stand_in([device for device in devices if b'"' + device[1] + b'"' in names])
    status, _, complaint = _run(nft, ["-f", "-"], text)
    if status:
        return b"", _first_line(complaint) or "it cannot load them"
    status, again, complaint = _run(nft, ["-n", "list", "ruleset"])
    if status:
        return b"", _first_line(complaint) or "it cannot read them again"
    lost = _lines(text) - _lines(again)
    lost.update(_lines(again) - _lines(text))
    return text, f"{max(lost, key=len).decode(errors='replace')!r} does not come back" if lost else ""


def _lines(text: bytes) -> Counter[bytes]:
    return Counter(line.strip() for line in _TICKING.sub(rb"\1", text).splitlines())


def _stand_in(devices: Iterable[Device]) -> None:
    """Make devices of these names and indexes, for rules that speak of them."""
    with Netlink(rtnetlink.socket_of()) as route:
        for number, (index, name) in enumerate(devices):
            if name == b"lo":
                continue
            peer = struct.pack("<BxHiII", 0, 0, _STAND_IN_PEERS + number, 0, 0)
            peer += attribute(IFLA.IFNAME, b"stands-in-%d\0" % number)
            info = attribute(IFLA_INFO.KIND, b"veth\0") + attribute(IFLA_INFO.DATA, attribute(1, peer))
            route.do(
                RTM.NEWLINK,
                struct.pack("<BxHiII", 0, 0, index, 0, 0)
                + attribute(IFLA.IFNAME, name + b"\0")
                + attribute(IFLA.LINKINFO, info),
                rtnetlink.CREATE | rtnetlink.EXCLUSIVE,
            )


def _keep_capabilities() -> None:
    """Let what a visitor executes have CAP_NET_ADMIN, also where the visitor is not root."""
    (line,) = [
        line for line in read_file("/proc/thread-self/status").splitlines() if line.startswith(b"CapPrm:")
    ]
    have = int(line.split()[1], 16)
    low, high = have & 0xFFFF_FFFF, have >> 32
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    syscall(NR.capset, header, struct.pack("<6I", low, low, low, high, high, high))
    prctl(PRCTL.CAP_AMBIENT, _AMBIENT_RAISE, _CAP_NET_ADMIN)


def _run(nft: str, arguments: Sequence[str], text: bytes = b"") -> tuple[int, bytes, bytes]:
    """Run nft where the caller, a visitor, is: its status, output and complaints."""
    files = [os.memfd_create("nft", os.MFD_CLOEXEC) for _ in range(3)]
    try:
        given, said, complained = files
        left = memoryview(text)
        while left:
            left = left[os.write(given, left) :]
        os.lseek(given, 0, os.SEEK_SET)
        child = os.posix_spawn(
            nft,
            [nft, *arguments],
            {"LANG": "C", "PATH": _SBIN},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, given, 0),
                (os.POSIX_SPAWN_DUP2, said, 1),
                (os.POSIX_SPAWN_DUP2, complained, 2),
            ],
        )
        _, status = os.waitpid(child, 0)
        return status, _whole(said), _whole(complained)
    finally:
        for fd in files:
            os.close(fd)


def _whole(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    return os.pread(fd, size, 0) if size else b""


def _first_line(said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[0] if lines else ""
