"""Unix socket pairs with queued data, files in flight, listening unix and TCP sockets, socket options."""

import array
import contextlib
import fcntl
import os
import select
import socket
import struct

from support import DIRECTORY, main

SO_PASSCRED, SO_PEERGROUPS = 16, 59


def receive_again(reader, writer, expected, size=1 << 16):
    """Receive all that is queued, and send it again for the next round."""
    found = []
    while True:
        try:
            piece = reader.recv(size, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        if not piece and not found:
            break
        found.append(piece)
        if b"".join(found) == b"".join(expected) and len(found) >= len(expected):
            break
    if reader.type == socket.SOCK_STREAM:
        found, expected = [b"".join(found)], [b"".join(expected)]
    for message in found:
        writer.send(message)
    return None if found == expected else f"{[m[:40] for m in found]}"


def pairs(program):
    stream_a, stream_b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    text = b"".join(b"%07d " % n for n in range(5000))
    stream_a.sendall(text)
    stream_b.sendall(b"the other way")
    program.check("stream", lambda: receive_again(stream_b, stream_a, [text]), lambda: stream_b.recv(3))
    program.check(
        "stream: other way",
        lambda: receive_again(stream_a, stream_b, [b"the other way"]),
        lambda: stream_a.recv(3),
    )

    dgram_a, dgram_b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    messages = [b"a message", b"", b"another " * 100, b"x"]
    for message in messages:
        dgram_a.send(message)

    def datagrams():
        found = [dgram_b.recv(65536, socket.MSG_DONTWAIT) for _ in messages]
        for message in found:
            dgram_a.send(message)
        return None if found == messages else f"{found}"

    program.check("datagrams", datagrams, lambda: dgram_b.recv(65536))

    packet_a, packet_b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    packet_a.send(b"first packet")
    packet_a.send(b"second")
    program.check(
        "packets",
        lambda: receive_again(packet_b, packet_a, [b"first packet", b"second"]),
        lambda: packet_b.recv(1),
    )
    stream_a.setblocking(False)
    stream_a.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    stream_a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    stream_b.settimeout(None)
    stream_b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("<2q", 9, 0))
    options = (socket.SO_TYPE, SO_PASSCRED, socket.SO_SNDBUF, socket.SO_RCVBUF)
    program.same(
        "options",
        lambda: [
            [s.getsockopt(socket.SOL_SOCKET, o) for o in options]
            for s in (stream_a, stream_b, dgram_a, packet_b)
        ],
        lambda: dgram_a.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1),
    )
    program.same(
        "timeout",
        lambda: stream_b.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16),
        lambda: stream_b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bytes(16)),
    )
    # The peer has gone, with words still in the queue; one direction shut.
    gone_a, gone_b = socket.socketpair()
    gone_a.send(b"last")
    gone_a.close()

    def peek_last():
        return gone_b.recv(10, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    program.same("peer gone", peek_last, lambda: gone_b.recv(2))
    shut_a, shut_b = socket.socketpair()
    shut_a.shutdown(socket.SHUT_WR)

    def half():
        shut_b.send(b"y")
        return shut_b.recv(1, socket.MSG_DONTWAIT), shut_a.recv(1, socket.MSG_DONTWAIT)

    program.same("half closed", half, shut_a.close)
    program.keep = stream_a, stream_b, dgram_a, dgram_b, packet_a, packet_b, gone_b, shut_a, shut_b


def between_processes(program):
    mine, theirs = socket.socketpair()
    mine.send(b"to the child")
    theirs.send(b"to the parent")

    def body(child):
        child.check(
            "socket pair", lambda: receive_again(theirs, mine, [b"to the child"]), lambda: theirs.recv(3)
        )

    program.child("peer", body)
    program.check(
        "socket pair", lambda: receive_again(mine, theirs, [b"to the parent"]), lambda: mine.recv(3)
    )


def converse(client, server):
    """One exchange over a new connection, then an orderly end of it."""
    server_side, _ = server.accept()
    client.sendall(b"question")
    question = server_side.recv(100)
    server_side.sendall(b"answer")
    answer = client.recv(100)
    client.close()
    rest = server_side.recv(100)
    server_side.close()
    return question, answer, rest


def listeners(program):
    path = f"{DIRECTORY}/listening"
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unix.bind(path)
    unix.listen(5)
    abstract = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    abstract.bind(b"\0" + path.encode())
    abstract.listen(2)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    tcp.bind(("127.0.0.1", 0))
    tcp.listen(7)
    tcp.setblocking(False)
    port = tcp.getsockname()[1]
    tcp6 = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    tcp6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    tcp6.bind(("::1", 0))
    tcp6.listen(1)

    def by_path():
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(path)
        return converse(client, unix)

    def by_abstract():
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(b"\0" + path.encode())
        return converse(client, abstract)

    def by_tcp():
        client = socket.create_connection(("127.0.0.1", port))
        return converse(client, tcp)

    def by_tcp6():
        client = socket.create_connection(tcp6.getsockname()[:2])
        return converse(client, tcp6)

    program.same("unix listener", by_path, unix.close)
    program.same("abstract listener", by_abstract, abstract.close)
    program.same("tcp listener: name", lambda: (tcp.getsockname(), tcp.gettimeout()), tcp.close)
    # Closing a connection leaves TIME_WAIT sockets on the port, which is what a restored listener meets too.
    program.same("tcp listener", by_tcp, lambda: None if tcp.fileno() < 0 else tcp.close())
    program.same("tcp6 listener", by_tcp6, tcp6.close)
    program.put("port", str(port))
    program.keep += unix, abstract, tcp, tcp6


def bound(program):
    path = f"{DIRECTORY}/datagrams"
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(path)

    def by_name():
        sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sender.sendto(b"to a name", path)
        sender.close()
        return receiver.recv(100), receiver.getsockname()

    program.same("bound datagram socket", by_name, receiver.close)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    program.same("udp", udp.getsockname, udp.close)


def send_files(sock, data, *fds):
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def receive_files(sock):
    data, control, _, _ = sock.recvmsg(100, 4096, socket.MSG_DONTWAIT)
    fds = array.array("i")
    for _, _, value in control:
        fds.frombytes(value)
    return data, list(fds)


def in_flight(program):
    """Files that are nowhere but in a queue; a socket in its own; received, looked at and sent again."""
    a, b = socket.socketpair()
    reader, writer = os.pipe()
    os.write(writer, b"in the pipe")
    far, near = os.pipe()  # the end to read from is in flight, the other here
    os.write(near, b"one end in flight")
    with select.epoll() as epoll:
        epoll.register(reader, select.EPOLLIN)
        c, d = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        send_files(d, b"inner", os.open(f"{DIRECTORY}/in_flight", os.O_RDWR | os.O_CREAT | os.O_APPEND))
        send_files(a, b"outer", reader, writer, epoll.fileno(), c.fileno(), b.fileno(), far)
    os.close(far)
    os.close(reader)
    os.close(writer)
    c.close()
    name = os.stat(b.fileno()).st_ino

    def received():
        data, fds = receive_files(b)
        reader, writer, epoll, c, own, far = fds
        try:
            with socket.socket(fileno=os.dup(c)) as inner:
                words, files = receive_files(inner)
                where = os.readlink(f"/proc/self/fd/{files[0]}")
                appends = bool(fcntl.fcntl(files[0], fcntl.F_GETFL) & os.O_APPEND)
                with socket.socket(fileno=os.dup(d.fileno())) as sender:
                    send_files(sender, words, *files)
                os.close(files[0])
            with select.epoll.fromfd(os.dup(epoll)) as instance:
                ready = [how for _, how in instance.poll(0)]
            text = os.read(reader, 100)
            os.write(writer, text)
            more = os.read(far, 100)
            os.write(near, more)
            send_files(a, data, *fds)
            same = os.fstat(own).st_ino == os.fstat(b.fileno()).st_ino
            return data, words, os.path.basename(where), appends, ready, text, more, same
        finally:
            for fd in fds:
                os.close(fd)

    program.same("files in flight", received, lambda: receive_files(b))
    urgent_a, urgent_b = socket.socketpair()

    def send_urgent():
        urgent_a.send(b"before")
        urgent_a.send(b"!", socket.MSG_OOB)
        urgent_a.send(b"after")

    def urgent():
        found = urgent_b.recv(100, socket.MSG_DONTWAIT), urgent_b.recv(1, socket.MSG_OOB)
        found += (urgent_b.recv(100, socket.MSG_DONTWAIT),)
        send_urgent()
        return found

    send_urgent()
    try:
        urgent()
    except BlockingIOError:  # before Linux 6.10 what is behind a byte that was taken is not found at once
        pass
    else:
        program.same("urgent byte", urgent, lambda: urgent_b.recv(1, socket.MSG_OOB))
    program.keep += a, b, d, urgent_a, urgent_b, name


def acquainted(program):
    """Both ends of a connection know who the other is."""

    def peer(sock):
        ucred = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return ucred, sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)

    names = f"{DIRECTORY}/acquainted", f"\0{DIRECTORY}/acquainted"
    listening = []
    for name in names:
        listening.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listening[-1].bind(name)
        listening[-1].listen(1)

    def caller(child):
        with contextlib.suppress(PermissionError):
            os.setgroups([3, 5])
        calls = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in names]
        for call, name in zip(calls, names, strict=True):
            call.connect(name)
        calls += socket.socketpair()
        child.same("acquainted", lambda: [peer(call) for call in calls], calls[0].close)

    program.child("caller", caller)
    accepted = [listener.accept()[0] for listener in listening]
    for listener in listening:
        listener.close()
    program.same("acquainted", lambda: [peer(sock) for sock in accepted], accepted[0].close)


def of_one_name(program):
    """Connections to one listener, and to that of another process, which has its name behind it."""
    name = f"{DIRECTORY}/one-name"

    def connected():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(name)
            listener.listen(5)
            ends = []
            for _ in range(3):
                ends.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                ends[-1].connect(name)
                ends.append(listener.accept()[0])
            os.unlink(name)
        for number, end in enumerate(ends):
            end.send(b"%d of %d" % (number, os.getpid()))
        return ends

    def seen(end):
        ucred = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return (
            ucred,
            end.getsockname(),
            end.getpeername(),
            end.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT),
        )

    def watched(process):
        ends = connected()
        process.same("of one name", lambda: [seen(end) for end in ends], lambda: ends[0].recv(100))

    watched(program)
    program.child("namesake", watched)


def senders(program):
    """Messages that know who sent them, also where nobody asks yet."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f"{DIRECTORY}/receiver")
    receiver.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    names = [f"{DIRECTORY}/sender.{number}" for number in range(2)]

    def send_all():
        for name in names:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.bind(name)
                sender.sendto(name.encode(), receiver.getsockname())
            os.unlink(name)

    def received():
        found = []
        for _ in names:
            data, control, _, sender = receiver.recvmsg(1000, 100, socket.MSG_DONTWAIT)
            found.append((data.decode() == sender, [struct.unpack("3i", value) for _, _, value in control]))
        send_all()
        return found

    send_all()
    program.same("senders", received, lambda: receiver.recv(1000))
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def sign():
        ucred = struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
        a.sendmsg([b"signed"], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, ucred)])

    def asked_late():
        b.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
        _, control, _, _ = b.recvmsg(100, 100, socket.MSG_DONTWAIT)
        b.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 0)
        sign()
        return [struct.unpack("3i", value) for _, _, value in control]

    sign()
    program.same("asked late", asked_late, lambda: b.recv(100) and a.send(b"by nobody"))
    program.keep += receiver, a, b


def body(program):
    pairs(program)
    in_flight(program)
    senders(program)
    acquainted(program)
    of_one_name(program)
    between_processes(program)
    listeners(program)
    bound(program)


main(body)
