"""Threads in long sleeps of every kind that the kernel goes on with when interrupted: none ends early, or with EINTR.

With and without room for the time that is left, and in a process that answers page faults itself. They are asleep
through several dumps and restores.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import threading
import time

from support import libc, main

CLOCK_NANOSLEEP, FUTEX, USERFAULTFD = 230, 202, 323
USER_MODE_ONLY = 1
API, REGISTER = 0xC018AA3F, 0xC020AA00
NAP_S = 8.0
TIME = struct.pack("<2q", int(NAP_S), 0)


def nanosleep(left):
    return libc.syscall(35, TIME, left)


def clock_nanosleep(left):
    return libc.syscall(CLOCK_NANOSLEEP, 7, 0, TIME, left)


def poll(_):
    return libc.poll(None, 0, int(NAP_S * 1000))


def futex(_):
    word = ctypes.c_int(0)
    result = libc.syscall(FUTEX, ctypes.byref(word), 128, 0, TIME, None, 0)
    return 0 if result == -1 and ctypes.get_errno() == 110 else result  # ETIMEDOUT


SLEEPS = {
    "nanosleep": (nanosleep, True),
    "nanosleep without rest": (nanosleep, False),
    "clock_nanosleep": (clock_nanosleep, True),
    "clock_nanosleep without rest": (clock_nanosleep, False),
    "poll": (poll, False),
    "futex": (futex, False),
}


def answering(report):
    """Sleep as the first thread of a process that answers for a page of its memory; report how it ended."""
    answerer = libc.syscall(USERFAULTFD, USER_MODE_ONLY | os.O_CLOEXEC)
    fcntl.ioctl(answerer, API, bytearray(struct.pack("<3Q", 0xAA, 0, 0)))
    page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    fcntl.ioctl(answerer, REGISTER, bytearray(struct.pack("<4Q", address, mmap.PAGESIZE, 1, 0)))
    begin = time.monotonic()
    result = clock_nanosleep(ctypes.create_string_buffer(16))
    error = ctypes.get_errno() if result else 0
    os.write(report, struct.pack("<2qd", result, error, time.monotonic() - begin))


def body(program):
    reports, report = os.pipe()
    answerer = os.fork()
    if not answerer:
        try:
            answering(report)
        finally:
            os._exit(0)
    os.close(report)
    ended = {}
    broken = []

    def asleep(name, sleep, room):
        begin = time.monotonic()
        result = sleep(ctypes.create_string_buffer(16) if room else None)
        ended[name] = result, ctypes.get_errno() if result else 0, time.monotonic() - begin

    def await_answerer():
        raw = os.read(reports, 24)
        ended["answering"] = struct.unpack("<2qd", raw) if raw else (-1, 0, 0.0)
        os.waitpid(answerer, 0)

    threading.Thread(target=await_answerer, daemon=True).start()
    for name, (sleep, room) in SLEEPS.items():
        threading.Thread(target=asleep, args=(name, sleep, room), daemon=True).start()
    begin = time.monotonic()

    def check(name):
        if broken:
            return "broken"
        if name not in ended:
            return None if time.monotonic() - begin < 4 * NAP_S else "sleeps too long"
        result, error, slept_s = ended[name]
        return (
            None
            if not result and slept_s >= NAP_S - 0.02
            else f"{result}, errno {error} after {slept_s:.3f} s"
        )

    for name in (*SLEEPS, "answering"):
        program.check(name, lambda name=name: check(name), lambda: broken.append(1))
    program.check("how many have ended", lambda: f"{len(ended)}" if broken else None, lambda: None)


main(body)
