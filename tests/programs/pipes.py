"""Pipes with bytes in them, between processes; FIFOs; sizes, packet mode, ends that are closed."""

import fcntl
import os

from support import DIRECTORY, main

F_GETPIPE_SZ, F_SETPIPE_SZ, O_DIRECT = 1032, 1031, 0o40000


def put_back(read, write, expected):
    """Read what must be inside, and put it back so that the next round finds it again."""
    found = os.read(read, 1 << 20)
    os.write(write, found)
    return None if found == expected else f"{len(found)} bytes, {found[:40]!r}..."


def body(program):
    read, write = os.pipe()
    text = b"".join(b"%08d" % n for n in range(6000))
    os.write(write, text)
    program.check("content", lambda: put_back(read, write, text), lambda: os.read(read, 1))

    big_read, big_write = os.pipe2(os.O_NONBLOCK)
    size = fcntl.fcntl(big_write, F_SETPIPE_SZ, 1 << 20)
    os.write(big_write, b"z" * (size - 4096))
    program.same(
        "size",
        lambda: fcntl.fcntl(big_read, F_GETPIPE_SZ),
        lambda: os.read(big_read, 1 << 20) and fcntl.fcntl(big_read, F_SETPIPE_SZ, 4096),
    )
    program.same(
        "flags",
        lambda: [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (read, write, big_read, big_write)],
        lambda: os.set_blocking(big_read, True),
    )

    packet_read, packet_write = os.pipe2(O_DIRECT | os.O_NONBLOCK)
    messages = [b"one", b"second", b"3"]
    for message in messages:
        os.write(packet_write, message)

    def packets():
        found = [os.read(packet_read, 4096) for _ in messages]
        for message in found:
            os.write(packet_write, message)
        return None if found == messages else f"{found}"

    program.check("packets", packets, lambda: os.write(packet_write, b"more") and os.read(packet_read, 9))

    # One end only: the other one was closed with bytes still inside.
    ended_read, ended_write = os.pipe()
    os.write(ended_write, b"last words")
    os.close(ended_write)
    state = {"first": True}

    def end_of_file():
        found = os.read(ended_read, 100), os.read(ended_read, 100)
        expected = (b"last words", b"") if state["first"] else (b"", b"")
        state["first"] = False
        return None if found == expected else f"{found}"

    def reopened():
        r, w = os.pipe2(os.O_NONBLOCK)
        os.dup2(r, ended_read)
        os.write(w, b"x")

    program.check("end of file", end_of_file, reopened)

    path = f"{DIRECTORY}/fifo"
    os.mkfifo(path, 0o666)
    fifo_read = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    fifo_write = os.open(path, os.O_WRONLY)
    fifo_both = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.write(fifo_write, b"through a name")
    program.check(
        "FIFO", lambda: put_back(fifo_read, fifo_write, b"through a name"), lambda: os.read(fifo_both, 3)
    )
    program.same(
        "FIFO: flags",
        lambda: [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (fifo_read, fifo_write, fifo_both)],
        lambda: os.set_blocking(fifo_both, True),
    )

    def through_name():
        by_name = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return put_back(by_name, fifo_write, b"through a name")
        finally:
            os.close(by_name)

    program.check("FIFO: by its name", through_name, lambda: os.rename(path, path + "2"))

    os.mkfifo(f"{DIRECTORY}/gone", 0o600)
    gone = os.open(f"{DIRECTORY}/gone", os.O_RDWR | os.O_NONBLOCK)
    os.write(gone, b"without a name")
    os.unlink(f"{DIRECTORY}/gone")
    program.check(
        "removed FIFO",
        lambda: f"{os.fstat(gone)}" if os.fstat(gone).st_nlink else put_back(gone, gone, b"without a name"),
        lambda: os.read(gone, 3),
    )
    # the same pipe by /dev/stdin and the like: another open file of it
    again = os.open(f"/proc/self/fd/{read}", os.O_RDWR | os.O_NONBLOCK)
    program.same(
        "opened again",
        lambda: (os.fstat(again).st_ino == os.fstat(read).st_ino, fcntl.fcntl(again, fcntl.F_GETFL)),
        lambda: os.dup2(gone, again),
    )

    # A conversation with a child over two pipes, each with bytes under way; each side puts back what it took.
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    os.write(down_write, b"from the parent")

    def other_end(child):
        os.write(up_write, b"from the child")
        child.check(
            "from the parent",
            lambda: put_back(down_read, down_write, b"from the parent"),
            lambda: os.read(down_read, 3),
        )

    program.child("other", other_end)
    program.check(
        "from the child", lambda: put_back(up_read, up_write, b"from the child"), lambda: os.read(up_read, 3)
    )

    # A reader that is alone: writing into what nobody reads must fail.
    alone_read, alone_write = os.pipe()
    os.close(alone_read)

    def nobody_reads():
        try:
            os.write(alone_write, b"x")
        except BrokenPipeError:
            return True
        return False

    program.same("nobody reads", nobody_reads, lambda: os.dup2(write, alone_write))


main(body)
