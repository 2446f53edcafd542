"""What a process is called: comm, overwritten argv, environment, auxv, exe link, vdso."""

import ctypes
import os
import struct
import time

from support import main, prctl, syscall


def read_bytes(name, pid="self"):
    with open(f"/proc/{pid}/{name}", "rb") as file:
        return file.read()


def fields():
    text = read_bytes("stat").decode("latin-1").rsplit(")", 1)[1].split()
    # start_code .. env_end of proc(5), counted from the state
    return [int(x) for x in text[23:26] + text[42:49]]


def find_vdso():
    data = read_bytes("auxv")
    for offset in range(0, len(data), 16):
        key, value = struct.unpack_from("<2Q", data, offset)
        if key == 33:
            return value
    return 0


def overwrite_argv():
    """Write over the argument area, as setproctitle does."""
    start, end = fields()[-4:-2]
    text = b"a new title for this process"[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))


def moved_environment(program):
    """PR_SET_MM is not needed for it: a variable written over in place."""
    start, end = fields()[-2:]
    area = ctypes.string_at(start, end - start)
    place = area.find(b"LANG=C")
    if place >= 0:
        ctypes.memmove(start + place, b"LONG=D", 6)
    program.same("environ", lambda: read_bytes("environ"), lambda: ctypes.memmove(start, b"!", 1))


def body(program):
    overwrite_argv()
    moved_environment(program)
    prctl(15, b"odd\n) name \xff")
    program.same("cmdline", lambda: read_bytes("cmdline"), lambda: ctypes.memmove(fields()[-4], b"!", 1))
    program.same("comm", lambda: read_bytes("comm"), lambda: prctl(15, b"spoilt"))
    # Nothing inside a process can change these: the spoilt check compares with a wrong value instead.
    broken = []
    before = read_bytes("auxv")
    program.check(
        "auxv",
        lambda: None if read_bytes("auxv") == before and not broken else "differs",
        lambda: broken.append(1),
    )
    exe = os.readlink("/proc/self/exe")
    program.check(
        "exe",
        lambda: (
            None if os.readlink("/proc/self/exe") == exe and not broken else os.readlink("/proc/self/exe")
        ),
        lambda: broken.append(1),
    )
    bounds = fields()
    program.check(
        "bounds of the address space",
        lambda: None if fields() == bounds and not broken else f"{fields()}",
        lambda: broken.append(1),
    )
    vdso = find_vdso()
    code = ctypes.string_at(vdso, 64)
    program.check(
        "vdso",
        lambda: None if ctypes.string_at(find_vdso(), 64) == code and not broken else "moved",
        lambda: broken.append(1),
    )

    def clocks():
        """Through the vdso and through the kernel: the same time."""
        via_vdso = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        buffer = ctypes.create_string_buffer(16)
        syscall(228, 1, buffer)
        seconds, nanoseconds = struct.unpack("<2q", buffer.raw)
        gap = seconds * 10**9 + nanoseconds - via_vdso + (10**12 if broken else 0)
        return None if 0 <= gap < 10**9 else f"{gap} ns apart"

    program.check("vdso clock", clocks, lambda: broken.append(1))


main(body)
