"""Unix sockets whose files are in unusual places; writers that are blocked by full queues; many senders."""

import os
import select
import signal
import socket
import time

from support import DIRECTORY, main, mount, syscall, wait_for

STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
CLONE_NEWNS = 0x20000
_UNSHARE = 272


def unix(kind=STREAM):
    return socket.socket(socket.AF_UNIX, kind)


def bound(name, kind=STREAM):
    sock = unix(kind)
    sock.bind(name)
    if kind == STREAM:
        sock.listen(3)
    return sock


def answers(listener, name):
    """A client that comes by a name is accepted, and what both sides say the name is."""
    with unix() as client:
        client.connect(name)
        server, _ = listener.accept()
        with server:
            client.send(b"hello")
            return server.recv(10), client.getpeername(), listener.getsockname()


def places(program):
    """Below a root of one's own, in a mount that others do not see, renamed, removed, relative."""

    def jailed(child):
        os.mkdir(f"{DIRECTORY}/jail")
        os.chroot(f"{DIRECTORY}/jail")
        os.chdir("/")
        listener = bound("/in-the-jail")
        child.same("below a root", lambda: answers(listener, "/in-the-jail"), listener.close)

    def apart(child):
        syscall(_UNSHARE, CLONE_NEWNS)
        mount(None, "/", None, 0x4000 | 0x40000)
        os.mkdir(f"{DIRECTORY}/apart")
        mount("apart", f"{DIRECTORY}/apart", "tmpfs", 0, "mode=755")
        name = f"{DIRECTORY}/apart/socket"
        listener = bound(name)
        child.same("in a mount of its own", lambda: answers(listener, name), listener.close)

    program.child("jailed", jailed)
    program.child("apart", apart)
    old, new = f"{DIRECTORY}/old-name", f"{DIRECTORY}/new-name"
    renamed = bound(old)
    os.rename(old, new)
    program.same("renamed", lambda: (answers(renamed, new), os.path.exists(old)), renamed.close)
    gone = bound(f"{DIRECTORY}/gone")
    with unix() as client:
        client.connect(f"{DIRECTORY}/gone")
        server, _ = gone.accept()
        kept = client.dup()
    os.unlink(f"{DIRECTORY}/gone")

    def without_file():
        kept.send(b"still")
        return server.recv(10), server.getsockname(), os.path.exists(f"{DIRECTORY}/gone")

    program.same("removed", without_file, server.close)
    os.chdir(DIRECTORY)
    relative = bound("relative")
    program.same("relative", lambda: answers(relative, f"{DIRECTORY}/relative")[:2], relative.close)
    program.keep = [renamed, gone, server, kept, relative]


def writer(program, name, sock, piece):
    """A process that writes numbers for ever, and soon is blocked; its pid."""
    pid = os.fork()
    if pid == 0:
        number = 0
        while True:
            sock.sendall(piece(number))
            number += 1
    program.children.append(pid)
    wait_for(lambda: blocked(pid), f"{name} is blocked")
    return pid


def blocked(pid):
    with open(f"/proc/{pid}/wchan") as wchan, open(f"/proc/{pid}/stat") as stat:
        return wchan.read() in ("sock_alloc_send_pskb", "unix_wait_for_peer", "0") and ") S " in stat.read()


def full(program):
    """What the blocked writers send is whole and in order, however often it is looked at."""
    for name, kind in (("stream", STREAM), ("datagram", DGRAM), ("packet", socket.SOCK_SEQPACKET)):
        reader, theirs = socket.socketpair(socket.AF_UNIX, kind)
        pid = writer(program, name, theirs, lambda number: b"%07d." % number * 100)
        expected = [0]

        def in_order(reader=reader, expected=expected, kind=kind, name=name):
            for _ in range(300):
                flags = socket.MSG_WAITALL if kind == STREAM else 0
                found, number = reader.recv(800, flags), expected[0]
                if found != b"%07d." % number * 100:
                    return f"{name}: {found[:16]} of {len(found)} bytes instead of {number}"
                expected[0] += 1
            time.sleep(0.01)
            return None

        def end(pid=pid, expected=expected):
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            expected[0] += 1

        program.check(f"blocked {name}", in_order, end)
        program.keep += [reader, theirs]


def crowd(program):
    """Many are connected to one datagram socket; some have ended, what they sent is there with their names."""
    receiver = bound(f"{DIRECTORY}/receiver", DGRAM)
    senders = []
    for number in range(4):
        sender = unix(DGRAM)
        if number:
            sender.bind(f"\0{DIRECTORY}/sender-{number}" if number % 2 else f"{DIRECTORY}/sender-{number}")
        sender.connect(f"{DIRECTORY}/receiver")
        senders.append(sender)
    lost = bound(f"{DIRECTORY}/lost", DGRAM)
    lost.connect(f"{DIRECTORY}/receiver")
    lost.send(b"last words")
    lost.close()

    def send():
        for number, sender in enumerate(senders):
            sender.send(b"from %d" % number)

    def receive(count):
        return [receiver.recvfrom(100, socket.MSG_DONTWAIT) for _ in range(count)]

    send()
    state = {"first": True}

    def received():
        found = receive(5 if state["first"] else 4)
        if state["first"]:
            if found.pop(0) != (b"last words", f"{DIRECTORY}/lost"):
                return "the last words are lost"
            state["first"] = False
        wanted = [
            (b"from %d" % number, sender.getsockname() or None) for number, sender in enumerate(senders)
        ]
        send()
        peers = {sender.getpeername() for sender in senders}
        return None if found == wanted and peers == {receiver.getsockname()} else f"{found} {peers}"

    program.check("many senders", received, lambda: receiver.recv(1))
    ready = select.epoll()
    ready.register(receiver, select.EPOLLIN)
    program.same("ready", lambda: len(ready.poll(0)), ready.close)
    program.keep += [receiver, senders, ready]


def body(program):
    places(program)
    full(program)
    crowd(program)


main(body)
