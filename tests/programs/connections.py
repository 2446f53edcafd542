"""TCP connections, in the network of the program's start and in one of its own: queues, halves, waiting clients."""

import fcntl
import os
import socket
import struct
import time

from support import call, libc, main

CLONE_NEWNET = 0x4000_0000
TCP = socket.IPPROTO_TCP
TCP_INFO = 11
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


def loopback_up():
    with socket.socket() as sock:
        request = struct.pack("16sH22x", b"lo", 0x49)  # UP, RUNNING, LOOPBACK
        fcntl.ioctl(sock, 0x8914, request)


def listening(family=socket.AF_INET, backlog=5):
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((HOSTS[family], 0))
    listener.listen(backlog)
    return listener


def connected(listener):
    client = socket.create_connection(listener.getsockname()[:2])
    server, _ = listener.accept()
    return client, server


def state(sock):
    return sock.getsockopt(TCP, TCP_INFO, 8)[0]


def take(sock, size, patience_s=5):
    found = b""
    sock.settimeout(patience_s)
    while len(found) < size and (piece := sock.recv(size - len(found))):
        found += piece
    sock.settimeout(None)
    return found


def again(reader, writer, text):
    """Take what is queued, which must be `text`, and send it again for the next round."""
    found = take(reader, len(text))
    if reader.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) if _readable(reader) else b"":
        return "there is more behind it"
    writer.sendall(found)
    return None if found == text else f"{found[:60]} ({len(found)} bytes)"


def _readable(sock):
    try:
        sock.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


def both_ways(program, name, family):
    listener = listening(family)
    client, server = connected(listener)
    there = b"".join(b"%07d " % n for n in range(4000))
    client.sendall(there)
    server.sendall(b"the other way")
    client.setsockopt(TCP, socket.TCP_NODELAY, 1)
    client.setsockopt(TCP, socket.TCP_KEEPIDLE, 55)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    names = client.getsockname(), client.getpeername(), server.getsockname(), server.getpeername()

    def there_and_back():
        found = again(server, client, there) or again(client, server, b"the other way")
        now = client.getsockname(), client.getpeername(), server.getsockname(), server.getpeername()
        return found or (None if now == names else f"{now}")

    program.check(f"{name}: queues", there_and_back, lambda: client.send(b"x"))
    options = (TCP, socket.TCP_NODELAY), (TCP, socket.TCP_KEEPIDLE), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    program.same(
        f"{name}: options",
        lambda: [client.getsockopt(*option) for option in options],
        lambda: client.setsockopt(TCP, socket.TCP_KEEPIDLE, 56),
    )

    def accepts():
        one, other = connected(listener)
        one.sendall(b"?")
        found = take(other, 1)
        one.close()
        other.close()
        return found

    program.same(f"{name}: listener", accepts, lambda: listener.shutdown(socket.SHUT_RDWR))
    return listener, client, server


def full(program):
    """More than the window lets through, in numbered words."""
    client, server = connected(listening())
    client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 200_000)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.setblocking(False)
    sent = 0
    try:
        while True:
            sent += client.send(b"".join(b"%07d " % n for n in range(sent // 8, sent // 8 + 500))[sent % 8 :])
    except BlockingIOError:
        pass
    client.setblocking(True)
    text = b"".join(b"%07d " % n for n in range(sent // 8 + 1))
    queued = [sent]

    def drained():
        expected = text[: queued.pop()]
        found = take(server, len(expected))
        client.setblocking(False)
        refilled = 0
        try:
            while refilled < sent:
                refilled += client.send(text[refilled : min(sent, refilled + 65536)])
        except BlockingIOError:
            pass
        finally:
            client.setblocking(True)
            queued.append(refilled)
        return None if found == expected else f"{len(found)} of {len(expected)} bytes, other ones"

    program.check("a closed window", drained, lambda: client.shutdown(socket.SHUT_WR))
    return client, server


def halves(program):
    listener = listening()
    client, server = connected(listener)
    client.sendall(b"last words")
    client.shutdown(socket.SHUT_WR)
    ended, other = connected(listener)
    other.sendall(b"bye")
    ended.shutdown(socket.SHUT_WR)
    other.shutdown(socket.SHUT_WR)
    left, closed = connected(listener)
    closed.sendall(b"bye")
    closed.close()
    time.sleep(0.05)

    def half():
        server.sendall(b"more")
        words = server.recv(100, socket.MSG_PEEK)
        return state(client), state(server), words, take(client, 4)

    program.same("half closed", half, lambda: server.recv(3))
    program.same(
        "closed by the other side",
        lambda: (
            state(left),
            left.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR),
            left.recv(9, socket.MSG_PEEK),
        ),
        lambda: left.recv(1),
    )
    program.same(
        "ended", lambda: (state(ended), state(other), ended.recv(9, socket.MSG_PEEK)), lambda: ended.recv(1)
    )
    return client, server, ended, other, left


def waiting(program):
    listener = listening()
    clients = [socket.create_connection(listener.getsockname())]
    time.sleep(0.02)

    def accepted():
        client = clients.pop()
        name = client.getsockname()
        listener.settimeout(2)
        server, address = listener.accept()
        client.sendall(b"hello")
        found = take(server, 5)
        client.close()
        server.close()
        clients.append(socket.create_connection(listener.getsockname()))
        time.sleep(0.02)
        return None if (found, address) == (b"hello", name) else f"{found} from {address}, not {name}"

    def taken():
        listener.accept()[0].close()

    program.check("a client waits", accepted, taken)
    return listener, clients


def in_flight(program):
    """A connection whose one end is in the queue of a unix socket, nowhere else."""
    client, server = connected(listening())
    near, far = socket.socketpair()
    socket.send_fds(near, [b"take it"], [server.fileno()])
    server.close()
    client.sendall(b"hello?")

    def found():
        text, fds, _, _ = socket.recv_fds(far, 100, 1)
        with socket.socket(fileno=fds[0]) as taken:
            words = take(taken, 6)
            client.sendall(words)
            socket.send_fds(near, [text], [taken.fileno()])
        return None if (text, words) == (b"take it", b"hello?") else f"{text} {words}"

    program.check("in flight", found, lambda: far.recv(1))
    return client, near, far


def counting(program):
    """Two processes that talk all the time: nothing is lost, repeated or out of order."""
    listener = listening()
    client, server = connected(listener)
    child = os.fork()
    if child == 0:
        client.close()
        number = 0
        try:
            while take(server, 8, None) == b"%08d" % number:
                server.sendall(b"%08d" % (number * 2 % 100_000_000))
                number += 1
        finally:
            os._exit(1)
    server.close()
    program.children.append(child)
    told = [0]

    def talk():
        for number in range(told[0], told[0] + 200):
            client.sendall(b"%08d" % number)
            answer = take(client, 8)
            if answer != b"%08d" % (number * 2 % 100_000_000):
                return f"{answer} to {number}"
        told[0] += 200
        return None

    program.check("talk", talk, lambda: client.sendall(b"nonsense"))
    return client, listener


def everything(program):
    program.keep = [
        both_ways(program, "v4", socket.AF_INET),
        both_ways(program, "v6", socket.AF_INET6),
        full(program),
        halves(program),
        waiting(program),
        in_flight(program),
        counting(program),
    ]


def apart(program):
    call(libc.unshare, CLONE_NEWNET)
    loopback_up()
    everything(program)


def body(program):
    everything(program)
    program.child("apart", apart)


main(body)
