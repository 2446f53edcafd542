"""Pages that were written with zeros: in new memory, over a file, in a child over the parent's, in a memfd."""

import hashlib
import mmap
import os

from support import main

PAGE = mmap.PAGESIZE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def digest(memory):
    return hashlib.sha256(memory[:]).hexdigest()


def same(program, name, memory):
    def spoil():
        memory[PAGE * 3] ^= 0xFF

    program.same(name, lambda: digest(memory), spoil)


def child(program, parents):
    parents[PAGE : 9 * PAGE] = bytes(8 * PAGE)
    same(program, "zero in the child", parents)


def build(program):
    zero = mmap.mmap(-1, 12 << 20, flags=PRIVATE)
    zero.write(bytes(len(zero)))
    same(program, "zero alone", zero)
    between = mmap.mmap(-1, 64 * PAGE, flags=PRIVATE)
    for page in range(64):
        between[page * PAGE : (page + 1) * PAGE] = bytes([page % 3]) * PAGE
    between[6 * PAGE + 2222] = 1
    same(program, "zero between", between)
    name = "underneath"
    file = os.open(name, os.O_RDWR | os.O_CREAT, dir_fd=program.directory)
    os.write(file, b"f" * 16 * PAGE)
    over = mmap.mmap(file, 16 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(file)
    over[2 * PAGE : 10 * PAGE] = bytes(8 * PAGE)
    same(program, "zero over a file", over)
    memory = os.memfd_create("zeroed")
    os.write(memory, b"m" * PAGE + bytes(8 * PAGE) + b"m" * PAGE)
    shared = mmap.mmap(memory, 10 * PAGE)
    same(program, "zero in a memfd", shared)
    parents = mmap.mmap(-1, 16 * PAGE, flags=PRIVATE)
    parents.write(b"p" * 16 * PAGE)
    same(program, "the parent's", parents)
    program.child("child", lambda program: child(program, parents))


main(build)
