"""Memory that is first touched when it is asked for: when it is moved, dropped, unmapped, or seen by a child.

Nothing of it is looked at in between, so that with pages that come later it is missing until then.
"""

import ctypes
import hashlib
import mmap
import os

from support import call, libc, main

SIZE = 4 << 20
HALF = SIZE // 2
ZEROS = hashlib.sha256(bytes(SIZE)).hexdigest()
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP, MAP_FIXED = 1, 2, 4, 0x10
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MADV_DONTNEED = 4
libc.mremap.restype = ctypes.c_void_p
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def taken():
    """The address of new memory."""
    return libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, PRIVATE, -1, 0)


def filled():
    """The address of new memory full of noise, and its digest."""
    address, content = taken(), os.urandom(SIZE)
    ctypes.memmove(address, content, SIZE)
    return address, hashlib.sha256(content).hexdigest()


def digest(address, size=SIZE):
    return hashlib.sha256((ctypes.c_char * size).from_address(address)).hexdigest()


def flip(address):
    """Change a byte."""
    ctypes.memset(address, 0xFF ^ ctypes.c_ubyte.from_address(address).value, 1)


def fixed(address, size, flags=PRIVATE):
    """New memory at an address, instead of what was there."""
    assert libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags | MAP_FIXED, -1, 0) == address


def move(source, target, flags=0):
    found = libc.mremap(source, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED | flags, target)
    assert found == target, ctypes.get_errno()


def body(program):
    asked = set()

    def again(name):
        """Whether it is asked for again: the first time is when the program begins."""
        known = name in asked
        asked.add(name)
        return known

    at, moved_is = filled()
    places = [at, taken()]

    def moved():
        if again("moved"):
            move(*places)
            fixed(places[0], SIZE)
            places.reverse()
            return digest(places[0])
        return moved_is

    program.same("moved", moved, lambda: flip(places[0]))

    left_at, left_is = filled()
    target = taken()

    def left():
        """Moved without its mapping: where it was are zeros."""
        if not again("left"):
            return left_is, ZEROS
        if not again("left twice"):
            move(left_at, target, MREMAP_DONTUNMAP)
        return digest(target), digest(left_at)

    program.same("left", left, lambda: flip(target))

    forked_at, forked_is = filled()

    def forked():
        """What a child sees, and its parent after it."""
        if not again("forked"):
            return forked_is, forked_is
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(write, digest(forked_at).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as answer:
            childs = answer.read()
        os.waitpid(pid, 0)
        return childs, digest(forked_at)

    program.same("forked", forked, lambda: flip(forked_at))

    dropped_at, _ = filled()

    def dropped():
        if again("dropped"):
            call(libc.madvise, dropped_at, SIZE, MADV_DONTNEED)
            return digest(dropped_at)
        return ZEROS

    def keep():
        """What is shared is not dropped."""
        fixed(dropped_at, SIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
        flip(dropped_at)

    program.same("dropped", dropped, keep)

    cut_at, _ = filled()
    second = digest(cut_at + HALF, HALF)

    def cut():
        """The first half is unmapped, and mapped anew: zeros."""
        if again("cut"):
            call(libc.munmap, cut_at, HALF)
            fixed(cut_at, HALF)
            return digest(cut_at, HALF), digest(cut_at + HALF, HALF)
        return hashlib.sha256(bytes(HALF)).hexdigest(), second

    program.same("cut", cut, lambda: flip(cut_at + HALF))


if __name__ == "__main__":
    main(body)
