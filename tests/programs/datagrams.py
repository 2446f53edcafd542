"""Sockets that are neither TCP nor unix: UDP in the network outside and in one of its own, and there all others too."""

import ctypes
import errno
import fcntl
import os
import socket
import struct

from support import libc, main, wait_for

CLONE_NEWNET = 0x40000000
IP, IPV6, SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET
MESSAGES = [b"", b"first", b"", b"x" * 30_000, b"last"]


def udp(family, protocol=0, host=None):
    sock = socket.socket(family, socket.SOCK_DGRAM, protocol)
    sock.bind((host or ("127.0.0.1" if family == socket.AF_INET else "::1"), 0))
    return sock


def take_all(sock):
    found = []
    while True:
        try:
            data, sender = sock.recvfrom(70_000, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return found
        found.append((data, sender[:2]))


def unread(program, name, family, protocol):
    """A socket with datagrams that wait; each look takes them and sends them again."""
    receiver = udp(family, protocol)
    senders = [udp(family, protocol), udp(family, protocol)]

    def send():
        for number, message in enumerate(MESSAGES):
            senders[number % 2].sendto(message, receiver.getsockname())

    def run():
        expected = [
            (message, senders[number % 2].getsockname()[:2]) for number, message in enumerate(MESSAGES)
        ]
        found = take_all(receiver)
        send()
        return None if found == expected else f"{[(d[:9], len(d), s) for d, s in found]}, not from {expected}"

    send()
    program.check(f"{name}: unread", run, lambda: receiver.recv(1))
    program.same(
        f"{name}: names",
        lambda: [s.getsockname() for s in (receiver, *senders)],
        senders[1].close,
    )
    program.keep += [receiver, *senders]


def ends(program):
    """Connected, shut down for writing, with a multicast group and options."""
    one, two = udp(socket.AF_INET), udp(socket.AF_INET)
    one.connect(two.getsockname())
    one.setsockopt(IP, socket.IP_TTL, 44)
    one.setsockopt(SOL, socket.SO_PRIORITY, 5)

    def talk():
        one.send(b"to the other")
        data, sender = two.recvfrom(100, socket.MSG_DONTWAIT)
        return data, sender == one.getsockname(), one.getpeername() == two.getsockname()

    program.same("connected", talk, lambda: one.connect(("127.0.0.1", 9)))
    program.same(
        "options",
        lambda: (one.getsockopt(IP, socket.IP_TTL), one.getsockopt(SOL, socket.SO_PRIORITY)),
        lambda: one.setsockopt(SOL, socket.SO_PRIORITY, 1),
    )
    shut = udp(socket.AF_INET)
    shut.connect(two.getsockname())
    shut.shutdown(socket.SHUT_WR)

    def half():
        try:
            shut.send(b"x")
        except BrokenPipeError:
            return None
        return "it can send"

    program.check("shut down", half, lambda: shut.connect(two.getsockname()) or replace(shut))
    program.keep += [one, two, shut]


def replace(sock):
    """Put a fresh socket in the place of another."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as fresh:
        os.dup2(fresh.fileno(), sock.fileno())
    sock.connect(("127.0.0.1", 9))


def groups(program):
    """Members of groups, one of a single source."""
    lo = socket.inet_aton("127.0.0.1")
    any_source, one_source = udp(socket.AF_INET, host="0.0.0.0"), udp(socket.AF_INET, host="0.0.0.0")
    any_source.setsockopt(IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton("239.9.8.7") + lo)
    one_source.setsockopt(IP, 39, socket.inet_aton("239.9.8.6") + lo + socket.inet_aton("127.0.0.9"))
    senders = []
    for host in ("127.0.0.1", "127.0.0.9"):
        sender = udp(socket.AF_INET, host=host)
        sender.setsockopt(IP, socket.IP_MULTICAST_IF, lo)
        senders.append(sender)

    def heard():
        found = []
        for receiver, group in ((any_source, "239.9.8.7"), (one_source, "239.9.8.6")):
            for sender in senders:
                sender.sendto(sender.getsockname()[0].encode(), (group, receiver.getsockname()[1]))
            found.append([data for data, _ in take_all(receiver)])
        return found

    assert heard() == [[b"127.0.0.1", b"127.0.0.9"], [b"127.0.0.9"]], heard()
    program.same(
        "groups",
        heard,
        lambda: any_source.setsockopt(IP, socket.IP_DROP_MEMBERSHIP, socket.inet_aton("239.9.8.7") + lo),
    )
    program.keep += [any_source, one_source, *senders]


def up(name):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        flags = fcntl.ioctl(sock, 0x8913, name.ljust(40, b"\0"))
        (now,) = struct.unpack_from("<H", flags, 16)
        fcntl.ioctl(sock, 0x8914, struct.pack("<16sH22x", name, now | 1))


def inside(program):
    """In a network of its own, where it has all capabilities."""
    program.keep = []
    if libc.unshare(CLONE_NEWNET):
        raise OSError(errno.EPERM, "no network of its own")
    up(b"lo")
    unread(program, "udp", socket.AF_INET, 0)
    wait_for(can_bind6, "::1")
    unread(program, "udp6", socket.AF_INET6, 0)
    unread(program, "udplite", socket.AF_INET, 136)
    ends(program)
    groups(program)


def raws(program):
    """Raw sockets of both families, with filters of ICMP, one connected."""
    four = socket.socket(socket.AF_INET, socket.SOCK_RAW, 200)
    four.bind(("127.0.0.1", 0))
    four.connect(("127.0.0.9", 0))
    icmp = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    icmp.setsockopt(socket.IPPROTO_ICMPV6, 1, b"\xff" * 32)
    icmp.bind(("::1", 0))
    other = socket.socket(socket.AF_INET, socket.SOCK_RAW, 200)
    other.bind(("127.0.0.9", 0))
    other.connect(("127.0.0.1", 0))

    def talk():
        four.send(b"to its peer")
        return other.recv(100, socket.MSG_DONTWAIT)[20:]

    program.same("raw", talk, lambda: four.connect(("127.0.0.7", 0)))
    program.same(
        "raw: filter",
        lambda: (icmp.getsockopt(socket.IPPROTO_ICMPV6, 1, 32), icmp.getsockname()),
        lambda: icmp.setsockopt(socket.IPPROTO_ICMPV6, 1, bytes(32)),
    )
    program.keep += [four, icmp, other]


def ping(program):
    """A ping socket with an identifier of its own."""
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:
        file.write(f"{os.getegid()} {os.getegid()}")
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
    sock.bind(("127.0.0.1", 4711))

    def echo():
        sock.sendto(struct.pack(">BBHHH", 8, 0, 0, 0, 1) + b"echo", ("127.0.0.1", 0))
        answer = sock.recv(100)
        with open("/proc/sys/net/ipv4/ping_group_range") as file:
            return answer[0], answer[4:], file.read()

    program.same("ping", echo, lambda: replace(sock))
    program.keep += [sock]


def packets(program):
    """Packet sockets: one of one device with a filter, members of a fanout group."""
    caught = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    instructions = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 33))
    caught.setsockopt(SOL, 26, struct.pack("<H6xQ", 1, ctypes.addressof(instructions)))
    caught.setsockopt(263, 1, struct.pack("<iHH8s", 1, 1, 0, b""))
    caught.setsockopt(263, 23, 1)
    caught.bind(("lo", 0x88B5))
    shared = [socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) for _ in range(2)]
    for sock in shared:
        sock.bind(("lo", 0x88B6))
        sock.setsockopt(263, 18, struct.pack("<I", 9 | 1 << 16))

    def catch():
        for protocol in (0x88B5, 0x88B6, 0x88B6):
            frame = bytes(12) + struct.pack(">H", protocol) + b"y" * 50
            shared[0].sendto(frame, ("lo", protocol, 0, 0, bytes(6)))
        counts = [len(take_all(sock)) for sock in shared]
        return len(caught.recv(100, socket.MSG_DONTWAIT)), counts, caught.getsockname()[:2]

    assert catch() == (33, [1, 1], ("lo", 0x88B5)), catch()
    program.same("packet", catch, lambda: caught.setsockopt(SOL, 27, 0))
    program.keep += [caught, *shared]


def netlinks(program):
    """Netlink sockets: of routes with groups, of events, of netfilter, of generic netlink."""
    route, events, filters, generic = (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) for protocol in (0, 15, 12, 16)
    )
    route.bind((0x7FFF0055, 1 << 4))
    route.setsockopt(270, 11, 1)
    events.bind((0, 1))
    filters.bind((0x7FFF0056, 1))
    generic.setsockopt(270, 1, 16)

    def seen():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for command in (0x8916, 0x8916):
                host = seen.next = (seen.next + 1) % 200
                address = struct.pack("<H2x4s8x", socket.AF_INET, bytes([127, 7, 0, host]))
                fcntl.ioctl(sock, command, struct.pack("<16s16s8x", b"lo:7", address))
        kinds = []
        while True:
            try:
                kinds.append(struct.unpack_from("<H", route.recv(10_000, socket.MSG_DONTWAIT), 4)[0])
            except BlockingIOError:
                break
        return 20 in kinds, [s.getsockname() for s in (route, filters)], generic.getsockopt(270, 9, 4)

    seen.next = 1
    program.same("netlink", seen, lambda: route.setsockopt(270, 2, 5))
    program.keep += [route, events, filters, generic]


def can_bind6():
    try:
        udp(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def body(program):
    program.keep = []
    unread(program, "udp", socket.AF_INET, 0)
    unread(program, "udp6", socket.AF_INET6, 0)
    unread(program, "udplite6", socket.AF_INET6, 136)
    ends(program)
    program.child("inside", inside)


main(body)
