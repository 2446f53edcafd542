"""Much of one thing: descriptors of many kinds, mappings, a sparse mapping, memory; as much as the arguments say.

Arguments behind the directory: descriptors, mappings, MiB of a sparse mapping, MiB of random memory, and, if they are
given, of random shared memory.
"""

import ctypes
import hashlib
import mmap
import os
import re
import resource
import socket
import sys

from support import call, libc, main

PAGE = mmap.PAGESIZE
SPARSE_PAGES = 100
MAP_NORESERVE = 0x4000
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def take(wanted, files):
    """As many descriptors, of nine kinds in turns; every pipe and socket has something in it."""
    taken = []
    number = 0
    while len(taken) < wanted:
        number += 1
        kind = number % 9
        if kind == 0:
            ends = os.pipe()
            os.write(ends[1], b"%d" % number)
        elif kind == 1:
            ends = [end.detach() for end in socket.socketpair()]
            os.write(ends[0], b"%d" % number)
        elif kind == 2:
            ends = [os.open(f"file{number % 500}", os.O_RDWR | os.O_CREAT, dir_fd=files)]
            os.lseek(ends[0], number, os.SEEK_SET)
        elif kind == 3:
            ends = [os.eventfd(number)]
        elif kind == 4:
            ends = [os.open("/dev/null", os.O_RDONLY)]
        elif kind == 5:
            ends = [os.dup(taken[number % len(taken)])]
        elif kind == 6:
            ends = [os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=files)]
        elif kind == 7:
            ends = [os.memfd_create(f"memory{number}")]
            os.write(ends[0], b"%d" % number)
        else:
            ends = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()]
        taken += ends
    return taken


def describe(taken):
    """What each is; the numbers of inodes, which change, become those of the first descriptor that has it."""
    first = {}
    found = []
    for fd in taken:
        try:
            link, state = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd)
            with open(f"/proc/self/fdinfo/{fd}") as info:
                lines = info.read()
        except OSError as error:
            found.append(str(error))
            continue
        here = first.setdefault((state.st_dev, state.st_ino), fd) if not link.startswith("anon_inode") else 0
        words = re.findall(r"(?m)^(?:pos|flags|eventfd-count):\s*(\S+)", lines)
        found.append((re.sub(r"\d+\]$", "]", link), here, state.st_mode, words))
    return found


def cut(mapping, pages):
    """Every other page of it becomes read-only: each is a mapping of its own then.

    The first page and the last are inaccessible: the kernel would join the pages beside them
    with a neighbour of the same rights, or not, by the order in which both were first written.
    """
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + PAGE
    for page in range(pages):
        mapping[(page + 1) * PAGE] = page % 251
    for edge in (start - PAGE, start + pages * PAGE):
        call(libc.mprotect, edge, PAGE, 0)
    for page in range(0, pages, 2):
        call(libc.mprotect, start + page * PAGE, PAGE, mmap.PROT_READ)
    return start


def pieces(start, length):
    """How many mappings there are in a range, and their rights."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            low, high = (int(word, 16) for word in line.split()[0].split("-"))
            if start <= low and high <= start + length:
                found.append((low - start, high - start, line.split()[1]))
    return found


def resident(start, length):
    """Pages of a range that are there."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(start // PAGE * 8)
        entries = memoryview(pagemap.read(length // PAGE * 8)).cast("Q")
    return [page for page, entry in enumerate(entries) if entry >> 63]


def body(program):
    words = [int(word) for word in sys.argv[2:7]]
    descriptors, mappings, sparse_mib, random_mib, *shared_mib = words or (60, 60, 64, 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors + 200,) * 2)
    taken = take(descriptors, program.directory)
    program.same("descriptors", lambda: describe(taken), lambda: os.close(taken[-1]))

    if mappings:
        cells = mmap.mmap(-1, (mappings + 2) * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        start = cut(cells, mappings)
        program.same(
            "mappings",
            lambda: (pieces(start, mappings * PAGE), hashlib.sha256(cells[PAGE:-PAGE]).digest()),
            lambda: call(libc.mprotect, start, PAGE, 0 | mmap.PROT_READ | mmap.PROT_WRITE),
        )
    if sparse_mib:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        sparse = mmap.mmap(-1, sparse_mib << 20, flags=flags)
        sparse.madvise(mmap.MADV_NOHUGEPAGE)
        used = [(sparse_mib << 20) // SPARSE_PAGES * n // PAGE * PAGE for n in range(SPARSE_PAGES)]
        for number, place in enumerate(used):
            sparse[place] = number + 1
        base = ctypes.addressof(ctypes.c_char.from_buffer(sparse))
        program.same(
            "sparse mapping",
            lambda: ([sparse[place] for place in used], resident(base, len(sparse))),
            lambda: sparse.__setitem__(PAGE, 1),
        )
    memory = bytearray(os.urandom(random_mib << 20))
    program.same(
        "memory", lambda: hashlib.sha256(memory).digest(), lambda: memory.__setitem__(-1, memory[-1] ^ 1)
    )
    if shared_mib:
        shared = mmap.mmap(-1, shared_mib[0] << 20)
        shared.write(os.urandom(len(shared)))
        program.same(
            "shared memory",
            lambda: hashlib.sha256(shared).digest(),
            lambda: shared.__setitem__(-1, shared[-1] ^ 1),
        )


main(body)
