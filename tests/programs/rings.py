"""Contexts of asynchronous I/O: unread events, a tail that went round, big rings, and that they still work.

With `forked` as argument a child has their mappings, too.
"""

import ctypes
import errno
import os
import struct
import sys

from support import main, syscall

IO_SETUP, IO_DESTROY, IO_GETEVENTS, IO_SUBMIT = 206, 207, 208, 209
PREAD = 0
REQUEST, EVENT = struct.Struct("<Q2IHhI2QqQ2I"), struct.Struct("<2Q2q")
PAGE = 4096


def setup(count):
    context = ctypes.c_ulong(0)
    syscall(IO_SETUP, count, ctypes.byref(context))
    return context.value


def header(context):
    return list((ctypes.c_uint * 4).from_address(context))[1:]


class Reader:
    """Reads of a file; each of its requests stays in memory."""

    def __init__(self, fd):
        self.fd = fd
        self.buffer = ctypes.create_string_buffer(16)
        self.requests = {}

    def submit(self, context, *tags):
        for tag in tags:
            request = REQUEST.pack(
                tag, 0, 0, PREAD, 0, self.fd, ctypes.addressof(self.buffer), tag % 7, 0, 0, 0, 0
            )
            self.requests[tag] = ctypes.create_string_buffer(request)
        pointers = (ctypes.c_void_p * len(tags))(*[ctypes.addressof(self.requests[tag]) for tag in tags])
        assert syscall(IO_SUBMIT, context, len(tags), pointers) == len(tags)

    def collect(self, context, most=64):
        """(tag, whether the address is that of its request, result) of what has ended, the oldest first."""
        buffer = ctypes.create_string_buffer(EVENT.size * most)
        count = syscall(IO_GETEVENTS, context, 0, most, buffer, struct.pack("<2q", 0, 0))
        events = [EVENT.unpack_from(buffer, EVENT.size * n) for n in range(count)]
        return [(tag, at == ctypes.addressof(self.requests[tag]), result) for tag, at, result, _ in events]


def body(program):
    fd = os.memfd_create("read")
    os.write(fd, b"0123456789")
    reader = Reader(fd)

    unread = setup(20)
    reader.submit(unread, *range(100, 105))
    reader.collect(unread, 2)

    def events():
        found = reader.collect(unread)
        reader.submit(unread, *[tag for tag, _, _ in found])
        return found

    program.same("unread events", events, lambda: reader.collect(unread, 1))

    around = setup(1)
    room = header(around)[0]
    for _ in range(room - 3):
        reader.submit(around, 5)
        reader.collect(around)
    reader.submit(around, *range(200, 206))
    assert header(around)[1:] == [room - 3, 3], header(around)

    def went_round():
        found = header(around), reader.collect(around)
        for _ in range(room - len(found[1])):
            reader.submit(around, 5)
            reader.collect(around)
        reader.submit(around, *range(200, 206))
        return found

    program.same("events around the end of a ring", went_round, lambda: reader.collect(around))

    big = setup(1000)
    reader.submit(big, *range(300, 310))
    reader.collect(big)

    def works():
        before = header(big)
        reader.submit(big, 77, 78)
        found = reader.collect(big), before[0]
        for _ in range(before[0] - 2):
            reader.submit(big, 5)
            reader.collect(big)
        return found, before

    program.same("works", works, lambda: reader.submit(big, 1))

    gone = setup(30)
    kept, spare = setup(30), setup(30)
    syscall(IO_DESTROY, gone)

    def held():
        with open("/proc/self/maps") as maps:
            places = [int(line.split("-")[0], 16) for line in maps if "[aio]" in line]
        return sorted(places) == sorted([unread, around, big, kept, spare])

    program.same("which there are", held, lambda: syscall(IO_DESTROY, spare))
    reader.submit(kept, *range(400, 464))
    reader.submit(kept, *range(500, 520))

    def many():
        found = reader.collect(kept, 128)
        reader.submit(kept, *[tag for tag, _, _ in found])
        return len(found), found[0], found[-1]

    program.same("many unread", many, lambda: reader.collect(kept, 3))
    if "forked" in sys.argv:
        program.child("forked", lambda child: seen_by_a_child(child, unread))


def seen_by_a_child(program, context):
    """A child has the mapping of a ring, and what is in it, but not the context."""

    def refused():
        try:
            syscall(IO_GETEVENTS, context, 0, 0, 0, 0)
        except OSError as error:
            return error.errno
        return None

    def seen():
        return refused() == errno.EINVAL, ctypes.string_at(context + 16, PAGE - 16)

    program.same("what is seen of a ring", seen, lambda: ctypes.memset(context + 200, 1, 1))


main(body)
