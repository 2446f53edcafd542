"""A packet filter of our own, by netlink: a table that drops the packets of exactly the given connections.

To the given listeners it drops the first segment of every new one: who sent it sends it again.

One batch makes it, so that it is there as a whole or not at all. A table that is *owned* by the netlink socket it was
made with ends with that socket: also when the process that holds it is killed, nothing of it is left. One that is not
owned stays until it is deleted or its network ends.

Both directions are dropped before connection tracking and before every other rule can see the packet. What has
`PASSING_MARK` passes: segments that are made for a socket here.

Source: include/uapi/linux/netfilter/nf_tables.h; net/netfilter/nf_tables_api.c (NFT_TABLE_F_OWNER, Linux 5.12).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pipeline.kernel.rtnetlink import attributes

#: how the names of tables begin that are there while a tree is looked at
LOOKING = "pipeline-looking-"
#: SO_MARK of segments that a lock lets through
PASSING_MARK = 0x7069_7065
_NETLINK_NETFILTER = 12
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NFTABLES = 10
_NEWTABLE, _GETTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM = 0, 1, 2, 3, 6, 9, 12
_REQUEST, _ACK, _DUMP, _EXCL, _CREATE, _APPEND = 0x1, 0x4, 0x300, 0x200, 0x400, 0x800
_INET = 1
_OWNED = 2
_PREROUTING, _LOCAL_OUT = 0, 3
_BEFORE_ALL = struct.pack(">i", -500)
_NESTED = 0x8000
_ERROR = 2
_TABLE_NAME = 1
#: first 32-bit register
_REGISTER = 8
_META_MARK, _META_NFPROTO, _META_L4PROTO = 3, 15, 16
_EQUAL, _NOT_EQUAL = 0, 1
_NETWORK, _TRANSPORT = 1, 2
_SYN, _ACKNOWLEDGES = 0x02, 0x10
#: types as nft(8) numbers them, for who lists the table
_IPV4, _IPV6, _SERVICE = 7, 8, 13
_PER_MESSAGE = 500
_RECEIVE_BYTES = 1 << 18
_BATCH_BYTES = 1 << 24
_SO_SNDBUFFORCE = 32

#: far address (packed), far port, near address, near port
Ends = tuple[bytes, int, bytes, int]
#: address and port that is listened on; an empty address is any
Listener = tuple[bytes, int]


def open_socket() -> socket.socket:
    """A netlink socket for the packet filter of the caller's network; the caller owns it.

    A batch has to fit into its send buffer: some thousand connections do for everybody, more for who may force it.
    """
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BATCH_BYTES)
        with suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BATCH_BYTES)
    except BaseException:
        sock.close()
        raise
    return sock


def make_lock(
    sock: socket.socket, name: str, ends: Sequence[Ends], listeners: Sequence[Listener], *, owned: bool
) -> None:
    """Make a table that drops everything between these ends, and what would begin at these listeners.

    Args:
        sock: of `open_socket`; an owned table ends with it.
        name: of the table.
        ends, listeners: IPv4 addresses have 4 bytes.
        owned: by `sock`.

    Raises:
        OSError: what the kernel says (EPERM: no CAP_NET_ADMIN; EPROTONOSUPPORT or EOPNOTSUPP: no nftables); there
            is no table then.
    """
    table = _text(1, name)
    batch = [
        _message(_NEWTABLE, _CREATE | _EXCL, table + _attribute(2, _OWNED if owned else 0)),
        *(
            _message(
                _NEWCHAIN,
                _CREATE | _EXCL,
                table
                + _text(3, chain)
                + _nest(4, _attribute(1, hook), _raw(2, _BEFORE_ALL))
                + _text(7, "filter"),
            )
            for chain, hook in (("in", _PREROUTING), ("out", _LOCAL_OUT))
        ),
    ]
    for number, (address_bytes, address) in enumerate(((4, _IPV4), (16, _IPV6)), 1):
        keys = [_both(one) for one in ends if len(one[0]) == address_bytes]
        heard = [_key(*one) for one in listeners if len(one[0]) == address_bytes]
        service = address << 6 | _SERVICE
        batch += _set(table, f"connections{number}", service << 12 | service, keys)
        batch += _set(table, f"listeners{number}", service, heard)
        for of_set, chain in ((f"connections{number}", "in"), (f"connections{number}", "out")):
            if keys:
                batch.append(_rule(table, chain, _of_connection(of_set, address_bytes, chain == "out")))
        if heard:
            batch.append(_rule(table, "in", _of_listener(f"listeners{number}", address_bytes)))
    ports = [struct.pack(">H", port) for host, port in listeners if not host]
    batch += _set(table, "listeners", _SERVICE, ports)
    if ports:
        batch.append(_rule(table, "in", _of_listener("listeners", 0)))
    _run_batch(sock, batch)


def delete_table(sock: socket.socket, name: str) -> bool:
    """Delete a table; false if there is none. OSError: what the kernel says."""
    try:
        _run_batch(sock, [_message(_DELTABLE, 0, _text(1, name))])
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL):
            return False
        raise
    return True


def tables(sock: socket.socket) -> list[str]:
    """The names of all tables of family inet. OSError: there is no nftables, or it may not be asked."""
    sock.send(_message(_GETTABLE, _DUMP, b""))
    return [
        attributes(content[4:])[_TABLE_NAME].rstrip(b"\0").decode(errors="replace")
        for kind, content in _answers(sock)
        if kind == _NFTABLES << 8 | _NEWTABLE
    ]


def _run_batch(sock: socket.socket, messages: Sequence[bytes]) -> None:
    begin = struct.pack("<IHHII4s", 20, _BATCH_BEGIN, _REQUEST, 0, 0, struct.pack(">BBH", 0, 0, _NFTABLES))
    end = struct.pack("<IHHII4s", 20, _BATCH_END, _REQUEST, 0, 0, struct.pack(">BBH", 0, 0, _NFTABLES))
    sock.send(b"".join([begin, *messages, end]))
    for _ in _answers(sock):
        pass


def _answers(sock: socket.socket) -> Iterator[tuple[int, bytes]]:
    """What the kernel has answered: it is complete when send(2) returns. OSError: the first error among it."""
    while True:
        try:
            data = sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        at = 0
        while at + 16 <= len(data):
            length, kind = struct.unpack_from("<IH", data, at)
            content = data[at + 16 : at + length]
            at += max(16, length + 3 & ~3)
            if kind == _ERROR:
                (code,) = struct.unpack_from("<i", content)
                if code:
                    raise OSError(-code, os.strerror(-code))
                continue
            yield kind, content


def _message(kind: int, flags: int, payload: bytes) -> bytes:
    head = struct.pack("<IHHII", 20 + len(payload), _NFTABLES << 8 | kind, flags | _REQUEST | _ACK, 0, 0)
    return head + struct.pack(">BBH", _INET, 0, 0) + payload


def _raw(kind: int, value: bytes) -> bytes:
    return struct.pack("<HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attribute(kind: int, value: int) -> bytes:
    return _raw(kind, struct.pack(">I", value))


def _text(kind: int, value: str) -> bytes:
    return _raw(kind, value.encode() + b"\0")


def _nest(kind: int, *inner: bytes) -> bytes:
    return _raw(kind | _NESTED, b"".join(inner))


def _key(address: bytes, port: int) -> bytes:
    """As it lies in the registers: each part fills whole ones."""
    return address + struct.pack(">HH", port, 0)


def _both(ends: Ends) -> bytes:
    return _key(*ends[:2]) + _key(*ends[2:])


def _set(table: bytes, name: str, shown: int, keys: Sequence[bytes]) -> Iterator[bytes]:
    """A set with elements; none, if there would be none in it."""
    if not keys:
        return
    called = table + _text(2, name)
    size = _attribute(4, shown) + _attribute(5, len(keys[0])) + _attribute(10, shown)
    yield _message(_NEWSET, _CREATE | _EXCL, called + _attribute(3, 0) + size)
    unique = sorted(set(keys))
    for at in range(0, len(unique), _PER_MESSAGE):
        elements = _nest(3, *(_nest(1, _nest(1, _raw(1, key))) for key in unique[at : at + _PER_MESSAGE]))
        yield _message(_NEWSETELEM, _CREATE, called + elements)


def _rule(table: bytes, chain: str, expressions: bytes) -> bytes:
    return _message(_NEWRULE, _CREATE | _APPEND, table + _text(2, chain) + _nest(4, expressions))


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nest(1, _text(1, name), _nest(2, *attributes))


def _compare(operator: int, value: bytes) -> bytes:
    test = _nest(3, _raw(1, value))
    return _expression("cmp", _attribute(1, _REGISTER), _attribute(2, operator), test)


def _meta(key: int, operator: int, value: bytes) -> bytes:
    load = _expression("meta", _attribute(2, key), _attribute(1, _REGISTER))
    return load + _compare(operator, value)


def _payload(register: int, base: int, offset: int, length: int) -> bytes:
    where = _attribute(2, base) + _attribute(3, offset) + _attribute(4, length)
    return _expression("payload", _attribute(1, register), where)


def _segments(address_bytes: int) -> bytes:
    """Of TCP, over a version of IP if one is meant, and not let through."""
    found = b""
    if address_bytes:
        found = _meta(_META_NFPROTO, _EQUAL, bytes([10 if address_bytes == 16 else 2]))
    found += _meta(_META_L4PROTO, _EQUAL, bytes([socket.IPPROTO_TCP]))
    return found + _meta(_META_MARK, _NOT_EQUAL, struct.pack("=I", PASSING_MARK))


def _drop_in(of_set: str) -> bytes:
    look = _expression("lookup", _text(1, of_set), _attribute(2, _REGISTER))
    return look + _expression("immediate", _attribute(1, 0), _nest(2, _nest(2, _attribute(1, 0))))


def _of_connection(of_set: str, address_bytes: int, outgoing: bool) -> bytes:
    """Addresses and ports are an element of the set: drop."""
    source, target = (8, 24) if address_bytes == 16 else (12, 16)
    ends = [(source, 0), (target, 2)]
    if outgoing:
        ends.reverse()
    found = _segments(address_bytes)
    register = _REGISTER
    for address_at, port_at in ends:
        found += _payload(register, _NETWORK, address_at, address_bytes)
        register += address_bytes // 4
        found += _payload(register, _TRANSPORT, port_at, 2)
        register += 1
    return found + _drop_in(of_set)


def _of_listener(of_set: str, address_bytes: int) -> bytes:
    """SYN without ACK, to an element of the set: drop."""
    found = _segments(address_bytes) + _payload(_REGISTER, _TRANSPORT, 13, 1)
    mask = _nest(4, _raw(1, bytes([_SYN | _ACKNOWLEDGES]))) + _nest(5, _raw(1, b"\0"))
    at = _attribute(1, _REGISTER) + _attribute(2, _REGISTER) + _attribute(3, 1)
    found += _expression("bitwise", at + mask) + _compare(_EQUAL, bytes([_SYN]))
    if address_bytes:
        found += _payload(_REGISTER, _NETWORK, 24 if address_bytes == 16 else 16, address_bytes)
    found += _payload(_REGISTER + address_bytes // 4, _TRANSPORT, 2, 2)
    return found + _drop_in(of_set)
