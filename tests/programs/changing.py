"""A process with much memory, and a child that does what a file of its name in the directory says: once.

``leave``: it ends. ``execute``: it becomes another program. ``watch``: a part of its memory is mapped anew, and watched
by a userfaultfd (its number is in the file ``watching``), which is not its own any more when there is a file ``taken``.

The argument behind the directory: MiB of the first process.
"""

import ctypes
import fcntl
import hashlib
import mmap
import os
import signal
import struct
import sys
import time

from support import libc, main, syscall, wait_for

PAGE = mmap.PAGESIZE
RANGE = 64 * PAGE
CODE = 7
NR_USERFAULTFD, USER_MODE_ONLY = 323, 1
UFFDIO_API, UFFDIO_REGISTER, MODE_WP = 0xC018AA3F, 0xC020AA00, 2
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]


def map_range(at, letter):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x10 if at else 0)  # MAP_FIXED
    address = libc.mmap(at, RANGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    ctypes.memset(address, ord(letter), RANGE)
    return address


def watch(program, address):
    map_range(address, "n")
    fd = syscall(NR_USERFAULTFD, USER_MODE_ONLY | os.O_CLOEXEC)
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("<3Q", 0xAA, 0, 0)))
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(struct.pack("<4Q", address, RANGE, MODE_WP, 0)))
    program.put("watching", str(fd))
    program.wait_file("taken")
    os.close(fd)
    program.put("given", "")


def change(program):
    address = map_range(None, "o")
    program.put("begun", "")
    while True:
        if program.exists("leave"):
            os._exit(CODE)
        if program.exists("execute"):
            os.execv("/bin/sleep", ["sleep", "1000"])
        if program.exists("watch"):
            watch(program, address)
            while True:
                time.sleep(0.01)
                if ctypes.string_at(address, RANGE) != b"n" * RANGE:
                    os._exit(CODE + 1)
        time.sleep(0.005)


def body(program):
    noise = bytearray(os.urandom((int(sys.argv[2]) if len(sys.argv) > 2 else 1) << 20))
    child = os.fork()
    if child == 0:
        change(program)
    program.children.append(child)
    program.wait_file("begun")

    def spoil_noise():
        noise[len(noise) // 2] ^= 1

    program.same("memory", lambda: hashlib.sha256(noise).hexdigest(), spoil_noise)

    def state():
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, child, flags)
        if ended is not None:
            return f"ended with {ended.si_status}"
        with open(f"/proc/{child}/comm") as file:
            return file.read().strip()

    as_it_was = state()

    def differs():
        wanted = as_it_was
        if program.exists("leave"):
            wanted = f"ended with {CODE}"
        elif program.exists("execute"):
            wanted = "sleep"
        found = state()
        return None if found == wanted else f"{found} instead of {wanted}"

    def spoil_child():
        os.kill(child, signal.SIGKILL)
        wait_for(lambda: state() == f"ended with {int(signal.SIGKILL)}", "the child's end")

    program.check("child", differs, spoil_child)


main(body)
