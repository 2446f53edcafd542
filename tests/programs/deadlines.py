"""Times of CLOCK_MONOTONIC and CLOCK_BOOTTIME that a program keeps: in memory, in timers, in what it sleeps until.

Whatever happens to it, these clocks never go back, a deadline is what is left until it, and nobody wakes up early.
"""

import ctypes
import mmap
import os
import struct
import time

from support import libc, main, syscall, wait_for

FAR_S = 1000
STEP_NS = 100_000_000
#: between what a clock says and what is compared with it, on a machine that has much to do
SLACK_S = 0.8
NS = 1_000_000_000
CLOCKS = {"monotonic": time.CLOCK_MONOTONIC, "boottime": time.CLOCK_BOOTTIME}
FUTEX_WAIT_BITSET = 9


def timespec(ns):
    return ctypes.create_string_buffer(struct.pack("<2q", *divmod(ns, NS)), 16)


def left_of(call, number):
    """What is left of a timer, in seconds."""
    value = ctypes.create_string_buffer(32)
    syscall(call, number, value)
    _, _, seconds, nanoseconds = struct.unpack("<4q", value.raw)
    return seconds + nanoseconds / NS


def arm(call, number, flags, due_ns):
    syscall(
        call, number, flags, ctypes.create_string_buffer(struct.pack("<4q", 0, 0, *divmod(due_ns, NS)), 32), 0
    )


def memory(program):
    """What it remembers of its clocks."""
    seen = {name: time.clock_gettime(clock) for name, clock in CLOCKS.items()}

    def run():
        for name, clock in CLOCKS.items():
            now = time.clock_gettime(clock)
            if now < seen[name]:
                return f"{name} went from {seen[name]} to {now}"
            if now > seen[name] + 300:
                return f"{name} jumped from {seen[name]} to {now}"
            seen[name] = now
        return None

    program.check("memory", run, lambda: seen.update(monotonic=seen["monotonic"] + 10_000))


def timers(program):
    """Timers of each kind that are due in a while."""
    for name, clock in CLOCKS.items():
        due = time.clock_gettime_ns(clock) + FAR_S * NS
        absolute, span = syscall(283, clock, 0), syscall(283, clock, 0)
        arm(286, absolute, 1, due)
        arm(286, span, 0, FAR_S * NS)
        identity = ctypes.create_string_buffer(4)
        syscall(222, clock, 0, identity)
        posix = int.from_bytes(identity.raw, "little")
        arm(223, posix, 1, due)

        def exact(clock=clock, due=due, absolute=absolute):
            at = time.clock_gettime(clock) + left_of(287, absolute)
            return None if abs(at - due / NS) < SLACK_S else f"due at {at}, not at {due / NS}"

        def roughly(clock=clock, due=due, span=span, posix=posix):
            now = time.clock_gettime(clock)
            for what, at in (
                ("timerfd", now + left_of(287, span)),
                ("POSIX timer", now + left_of(224, posix)),
            ):
                if not due / NS - 0.1 <= at < due / NS + 100:
                    return f"{what}: due at {at}, not at {due / NS}"
            return None

        program.check(f"{name}: absolute timerfd", exact, lambda f=absolute: arm(286, f, 0, NS))
        program.check(f"{name}: timers for a span", roughly, lambda f=span: arm(286, f, 0, NS))
        program.keep += [absolute, span, posix]


def sleep_until(clock, due_ns, word):
    libc.clock_nanosleep(clock, 1, timespec(due_ns), None)


def wait_until(_, due_ns, word):
    libc.syscall(202, ctypes.byref(word), FUTEX_WAIT_BITSET, 0, timespec(due_ns), None, 0xFFFFFFFF)


def sleepers(program):
    """Children that sleep from one absolute time to the next; each counts, and says how early it ever was."""
    told = mmap.mmap(-1, 4096)

    def body(index, clock, sleep):
        word = ctypes.c_uint(0)
        count = 0
        due = time.clock_gettime_ns(clock)
        while True:
            due += STEP_NS
            sleep(clock, due, word)
            early = due - time.clock_gettime_ns(clock)
            count += 1
            before = struct.unpack_from("<q", told, index * 16 + 8)[0]
            struct.pack_into("<2q", told, index * 16, count, max(before, early))

    kinds = [
        (time.CLOCK_MONOTONIC, sleep_until),
        (time.CLOCK_BOOTTIME, sleep_until),
        (time.CLOCK_MONOTONIC, wait_until),
    ]
    for index, (clock, sleep) in enumerate(kinds):
        child = os.fork()
        if child == 0:
            try:
                body(index, clock, sleep)
            finally:
                os._exit(1)
        program.children.append(child)

        def run(index=index):
            before = struct.unpack_from("<q", told, index * 16)[0]
            wait_for(lambda: struct.unpack_from("<q", told, index * 16)[0] > before, "a sleeper", 3)
            early = struct.unpack_from("<q", told, index * 16 + 8)[0]
            return f"woke {early} ns early" if early > 0 else None

        def spoil(child=child):
            os.kill(child, 9)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)

        program.check(f"{sleep.__name__} {clock}", run, spoil)
    program.keep += [told]


def body(program):
    program.keep = []
    memory(program)
    timers(program)
    sleepers(program)


main(body)
