"""POSIX message queues: attributes, messages by priority and age, names that are gone, and a reader that waits.

In an ipc namespace of its own; with `external` as argument they are queues of its surroundings.
"""

import ctypes
import os
import struct
import sys

from support import call, libc, main, syscall, wait_for

CLONE_NEWIPC = 0x08000000
MQ_OPEN, MQ_UNLINK, MQ_SEND, MQ_RECEIVE, MQ_GETSETATTR = 240, 241, 242, 243, 245
NOW = struct.pack("<2q", 0, 0)


def opened(name, flags, room=None, mode=0o600):
    attributes = struct.pack("<4q32x", 0, *room, 0) if room else None
    return syscall(MQ_OPEN, name, flags | os.O_CLOEXEC, mode, attributes)


def attributes(queue):
    buffer = ctypes.create_string_buffer(64)
    syscall(MQ_GETSETATTR, queue, None, buffer)
    return struct.unpack("<4q32x", buffer.raw)


def send(queue, text, priority):
    syscall(MQ_SEND, queue, text, len(text), priority, NOW)


def receive(queue):
    size = attributes(queue)[2]
    buffer, priority = ctypes.create_string_buffer(size), ctypes.create_string_buffer(4)
    length = syscall(MQ_RECEIVE, queue, buffer, size, priority, NOW)
    return int.from_bytes(priority.raw, "little"), buffer.raw[:length]


def contents(queue):
    """Everything, taken and put back."""
    found = [receive(queue) for _ in range(attributes(queue)[3])]
    for priority, text in found:
        send(queue, text, priority)
    return found


def body(program):
    prefix = b"test-%d-" % os.getpid()
    if "external" not in sys.argv:
        call(libc.unshare, CLONE_NEWIPC)
        prefix = b""

    everything = [(n % 3, b"message %d" % n) for n in range(8)] + [(32767, b""), (5, b"z" * 128)]
    queue = opened(prefix + b"plain", os.O_RDWR | os.O_CREAT | os.O_EXCL, (10, 128), 0o640)
    for priority, text in everything:
        send(queue, text, priority)
    program.same("mqueue: messages", lambda: contents(queue), lambda: receive(queue))
    program.same("mqueue: attributes", lambda: attributes(queue), lambda: os.set_blocking(queue, False))
    writer = opened(prefix + b"plain", os.O_WRONLY | os.O_NONBLOCK)

    def full():
        try:
            send(writer, b"x", 0)
        except OSError as error:
            return error.errno
        return None

    program.same("mqueue: full, and not to be read", full, lambda: os.dup2(queue, writer))

    other = opened(prefix + b"nobody-has-it-open", os.O_RDWR | os.O_CREAT | os.O_EXCL, (3, 10))
    send(other, b"kept", 4)
    os.close(other)

    def by_name():
        fd = opened(prefix + b"nobody-has-it-open", os.O_RDWR)
        try:
            found = os.fstat(fd)
            return contents(fd), attributes(fd), found.st_uid, found.st_gid, found.st_mode
        finally:
            os.close(fd)

    program.same("mqueue: by name", by_name, lambda: syscall(MQ_UNLINK, prefix + b"nobody-has-it-open"))

    gone = opened(prefix + b"gone", os.O_RDWR | os.O_CREAT | os.O_EXCL, (4, 64))
    send(gone, b"first", 1)
    send(gone, b"second", 1)
    reading = opened(prefix + b"gone", os.O_RDONLY | os.O_NONBLOCK)
    syscall(MQ_UNLINK, prefix + b"gone")
    program.same("mqueue: without a name", lambda: contents(gone), lambda: receive(reading))

    def has_no_name():
        try:
            os.close(opened(prefix + b"gone", os.O_RDONLY))
        except OSError as error:
            return error.errno
        return None

    program.same(
        "mqueue: the name is free", has_no_name, lambda: opened(prefix + b"gone", os.O_RDWR | os.O_CREAT)
    )

    wait = opened(prefix + b"wait", os.O_RDWR | os.O_CREAT | os.O_EXCL, (1, 8))
    answer = opened(prefix + b"answer", os.O_RDWR | os.O_CREAT | os.O_EXCL, (1, 8))

    def echo():
        buffer = ctypes.create_string_buffer(8)
        length = syscall(MQ_RECEIVE, wait, buffer, 8, None, None)
        send(answer, buffer.raw[:length], 0)

    program.busy("mqueue: a reader that waits", echo)

    def echoes():
        send(wait, b"ping", 0)
        return wait_for(lambda: attributes(answer)[3], "an answer") and receive(answer)[1]

    program.same(
        "mqueue: who waits is woken", echoes, lambda: os.dup2(os.open("/dev/null", os.O_RDWR), answer)
    )


main(body)
