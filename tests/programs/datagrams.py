"""Sockets that are neither TCP nor unix: UDP in the network outside and in one of its own, and there all others too."""

import errno
import os
import socket
import struct

from support import libc, main, wait_for

CLONE_NEWNET = 0x40000000
IP, IPV6, SOL = socket.IPPROTO_IP, socket.IPPROTO_IPV6, socket.SOL_SOCKET
MESSAGES = [b"first", b"", b"x" * 30_000, b"last"]


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
        import fcntl

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
