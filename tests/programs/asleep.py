"""Threads in long sleeps of every kind that the kernel goes on with when interrupted: none ends early, or with EINTR.

With and without room for the time that is left. They are asleep through several dumps and restores.
"""

import ctypes
import struct
import threading
import time

from support import libc, main

CLOCK_NANOSLEEP, FUTEX = 230, 202
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


def body(program):
    ended = {}
    broken = []

    def asleep(name, sleep, room):
        begin = time.monotonic()
        result = sleep(ctypes.create_string_buffer(16) if room else None)
        ended[name] = result, ctypes.get_errno() if result else 0, time.monotonic() - begin

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

    for name in SLEEPS:
        program.check(name, lambda name=name: check(name), lambda: broken.append(1))
    program.check("how many have ended", lambda: f"{len(ended)}" if broken else None, lambda: None)


main(body)
