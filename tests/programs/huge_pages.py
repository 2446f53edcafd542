"""Huge pages of hugetlbfs: private, not writable, shared with a child, a memfd, copied on write; holes among them.

To look at a hole would make a page of it, so checks look at what is there, and at how much that is.
"""

import ctypes
import fcntl
import hashlib
import os
import random
import re

from support import main, syscall

SYS_MMAP, SYS_MPROTECT = 9, 10
NONE, READ, WRITE, EXEC = 0, 1, 2, 4
SHARED, PRIVATE, ANON, NORESERVE, HUGETLB = 1, 2, 0x20, 0x4000, 0x40000
HUGE = 2 << 20
SIZE_FLAG = 21 << 26
MFD_HUGETLB = 4
F_ADD_SEALS, F_GET_SEALS, SEAL_SHRINK, SEAL_GROW = 1033, 1034, 2, 4


def map_at(pages, flags, fd=-1):
    flags |= HUGETLB | SIZE_FLAG
    return syscall(SYS_MMAP, 0, pages * HUGE, READ | WRITE, flags, fd, 0) & 0xFFFF_FFFF_FFFF_FFFF


def protect(address, prot):
    syscall(SYS_MPROTECT, address, HUGE, prot)


def put(address, data):
    ctypes.memmove(address, data, len(data))


def digest(address, length=HUGE):
    return hashlib.sha256(ctypes.string_at(address, length)).hexdigest()


def described(address):
    """What smaps says of the mapping."""
    found = []
    inside = False
    with open("/proc/self/smaps") as file:
        for line in file:
            name, *words = line.split()
            if not name.endswith(":"):
                start, end = (int(x, 16) for x in name.split("-"))
                inside = start <= address < end
                if inside:
                    found += [words[0], end - start]
            elif inside and name in {"KernelPageSize:", "VmFlags:"}:
                found.append(" ".join(words))
    return found


def there(address):
    """KiB of the pages of a private mapping: those that others have, too, and those of its own."""
    with open("/proc/self/smaps") as file:
        text = file.read().split(f"\n{address:x}-")[1]
    return re.findall(r"(\w+)_Hugetlb: +(\d+) kB", text)[:2]


def body(program):
    noise = random.Random(5)
    private = map_at(4, PRIVATE | ANON)
    put(private, noise.randbytes(HUGE))
    put(private + 2 * HUGE + 5000, b"far in")
    fixed = map_at(2, PRIVATE | ANON)
    put(fixed, noise.randbytes(HUGE))
    put(fixed + HUGE, noise.randbytes(HUGE))
    protect(fixed, NONE)
    protect(fixed + HUGE, READ)
    lucky = map_at(3, PRIVATE | ANON | NORESERVE)
    put(lucky + HUGE, b"not reserved")
    shared = map_at(2, SHARED | ANON)
    put(shared + HUGE, noise.randbytes(9000))
    fd = os.memfd_create("between", os.MFD_ALLOW_SEALING | MFD_HUGETLB | SIZE_FLAG)
    os.ftruncate(fd, 3 * HUGE)
    memfd = map_at(3, SHARED, fd)
    put(memfd + HUGE, noise.randbytes(HUGE))
    copied = map_at(3, PRIVATE, fd)
    put(copied + 2 * HUGE, b"its own")
    fcntl.fcntl(fd, F_ADD_SEALS, SEAL_SHRINK)
    family = map_at(3, PRIVATE | ANON)
    put(family, noise.randbytes(2 * HUGE))

    def child(task):
        put(family + HUGE + 8, b"the child's")
        task.same("not changed", lambda: digest(family), lambda: put(family, b"!"))
        task.same("its own", lambda: digest(family + HUGE), lambda: put(family + HUGE, b"!"))
        task.same("shared", lambda: digest(shared + HUGE), lambda: put(shared + HUGE, b"!"))

    program.child("child", child)
    pages = {
        "private, full": private,
        "private, behind a hole": private + 2 * HUGE,
        "not reserved": lucky + HUGE,
        "shared": shared + HUGE,
        "memfd": memfd + HUGE,
        "of the memfd, its own": copied + 2 * HUGE,
        "of the family": family,
        "of the family, its own": family + HUGE,
    }
    for name, address in pages.items():
        program.same(f"content: {name}", lambda at=address: digest(at), lambda at=address: put(at + 9, b"!"))
    #: private mappings, and which of their pages is a hole
    holed = {
        "private": (private, 1),
        "not reserved": (lucky, 0),
        "copied": (copied, 0),
        "family": (family, 2),
    }
    for name, (address, hole) in holed.items():
        program.same(
            f"pages: {name}",
            lambda at=address: there(at),
            lambda at=address + hole * HUGE: put(at, b"!"),
        )
    mappings = {name: address for name, (address, _) in holed.items()}
    mappings |= {"not readable": fixed, "read only": fixed + HUGE, "shared": shared, "memfd": memfd}
    for name, address in mappings.items():
        program.same(
            f"mapping: {name}",
            lambda at=address: described(at),
            lambda at=address: protect(at, READ | EXEC),
        )

    def unreadable():
        protect(fixed, READ)
        try:
            return digest(fixed)
        finally:
            protect(fixed, NONE)

    def spoil(address):
        protect(address, READ | WRITE)
        put(address, b"!")

    program.same("content: not readable", unreadable, lambda: spoil(fixed))
    program.same("content: read only", lambda: digest(fixed + HUGE), lambda: spoil(fixed + HUGE))

    def file():
        stat = os.fstat(fd)
        content = hashlib.sha256(os.pread(fd, stat.st_size, 0)).hexdigest()
        return content, stat.st_size, stat.st_blocks, fcntl.fcntl(fd, F_GET_SEALS)

    program.same("file", file, lambda: fcntl.fcntl(fd, F_ADD_SEALS, SEAL_GROW))


main(body)
