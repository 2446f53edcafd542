"""Memory between processes: shared anonymous memory, memfds, copy-on-write pages that must not balloon, DONTFORK."""

import ctypes
import os
import random
import struct

from support import main, syscall

SYS_MMAP, SYS_MADVISE = 9, 28
READ, WRITE, SHARED, PRIVATE, ANON = 1, 2, 1, 2, 0x20
MADV_DONTFORK, MADV_WIPEONFORK = 10, 18
PAGE = 4096
PAGES = 1024


def map_at(pages, flags, fd=-1):
    return syscall(SYS_MMAP, 0, pages * PAGE, READ | WRITE, flags, fd, 0) & 0xFFFF_FFFF_FFFF_FFFF


def put(address, data):
    ctypes.memmove(address, data, len(data))


def get(address, length):
    return ctypes.string_at(address, length)


def word(address):
    return ctypes.c_uint64.from_address(address)


def rollup(address):
    """Shared and private KiB of the mapping that holds `address`."""
    sums = {}
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            head = line.split()
            if not head[0].endswith(":"):
                start, end = (int(x, 16) for x in head[0].split("-"))
                inside = start <= address < end
            elif inside and head[0] in {"Shared_Clean:", "Shared_Dirty:", "Private_Clean:", "Private_Dirty:"}:
                kind = head[0].split("_")[0]
                sums[kind] = sums.get(kind, 0) + int(head[1])
    return sums.get("Shared", 0), sums.get("Private", 0)


def body(program):
    data = random.Random(3).randbytes(PAGES * PAGE)
    shared = map_at(16, SHARED | ANON)
    fd = os.memfd_create("between")
    os.ftruncate(fd, 8 * PAGE)
    memfd = map_at(8, SHARED, fd)
    os.close(fd)
    cow = map_at(PAGES, PRIVATE | ANON)
    put(cow, data)
    secret = map_at(2, PRIVATE | ANON)
    put(secret, b"not for children")
    syscall(SYS_MADVISE, secret, 2 * PAGE, MADV_DONTFORK)
    wiped = map_at(2, PRIVATE | ANON)
    put(wiped, b"wiped in children")
    syscall(SYS_MADVISE, wiped, 2 * PAGE, MADV_WIPEONFORK)

    def cow_stays_shared():
        kib_shared, kib_private = rollup(cow)
        return None if kib_private * 4 < kib_shared else f"{kib_private} KiB private, {kib_shared} KiB shared"

    def unshare_pages():
        for page in range(100, PAGES):
            put(cow + page * PAGE, data[page * PAGE : page * PAGE + 8])

    def child_body(number):
        def run(child):
            put(cow + (number + 1) * PAGE, b"changed by child %d" % number)
            child.same("own pages", lambda: get(cow, 8 * PAGE), lambda: put(cow, b"!"))
            child.same(
                "not changed",
                lambda: get(cow + 8 * PAGE, (PAGES - 8) * PAGE) == data[8 * PAGE :],
                lambda: put(cow + 20 * PAGE, bytes(8)),
            )
            child.check("copy-on-write stays shared", cow_stays_shared, unshare_pages)
            child.same("wiped", lambda: get(wiped, 17), lambda: put(wiped, b"!"))

        return run

    for number in (1, 2):
        program.child(f"child{number}", child_body(number))
    own = os.getpid()
    word(shared).value = own
    word(memfd).value = own

    def same_memory():
        """What the parent writes here, a child's own memory shows: read with process_vm_readv."""
        token = word(shared).value + 1
        word(shared).value = token
        word(memfd).value = token
        found = []
        for pid in program.answering:
            for address in (shared, memfd):
                buffer = ctypes.create_string_buffer(8)
                local = struct.pack("<2Q", ctypes.addressof(buffer), 8)
                remote = struct.pack("<2Q", address, 8)
                syscall(310, pid, local, 1, remote, 1, 0)
                found.append(struct.unpack("<Q", buffer.raw)[0] - token)
        return found

    program.same(
        "seen by the children",
        same_memory,
        lambda: syscall(SYS_MMAP, shared, 16 * PAGE, READ | WRITE, PRIVATE | ANON | 0x10, -1, 0),
    )
    program.same("own pages", lambda: get(cow, PAGES * PAGE) == data, lambda: put(cow + 30 * PAGE, bytes(8)))
    program.check("copy-on-write stays shared", cow_stays_shared, unshare_pages)
    program.same("kept from children", lambda: get(secret, 20), lambda: put(secret, b"!"))


main(body)
