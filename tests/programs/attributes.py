"""Per-task attributes: limits, scheduling, affinity, ioprio, oom_score_adj, personality, settings of prctl(2)."""

import ctypes
import mmap
import os
import resource
import signal
import struct

from support import main, prctl, syscall, wait_for

SYS_IOPRIO_SET, SYS_IOPRIO_GET, SYS_PERSONALITY = 251, 252, 135
SYS_SCHED_SETATTR, SYS_SCHED_GETATTR = 314, 315
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG = 1, 2
PR_GET_DUMPABLE, PR_SET_DUMPABLE = 3, 4
PR_GET_KEEPCAPS, PR_SET_KEEPCAPS = 7, 8
PR_SET_TIMERSLACK, PR_GET_TIMERSLACK = 29, 30
PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37
PR_SET_NO_NEW_PRIVS, PR_GET_NO_NEW_PRIVS = 38, 39
PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42
PR_MCE_KILL, PR_MCE_KILL_GET = 33, 34
PR_SET_MDWE, PR_GET_MDWE, PR_SET_MEMORY_MERGE, PR_GET_MEMORY_MERGE = 65, 66, 67, 68
SYS_SET_MEMPOLICY, SYS_GET_MEMPOLICY, MPOL_BIND = 238, 239, 2
SYS_MEMBARRIER, REGISTER_GLOBAL_EXPEDITED, PRIVATE_EXPEDITED, REGISTER_PRIVATE_EXPEDITED = 324, 4, 8, 16
GET_REGISTRATIONS = 512
ADDR_NO_RANDOMIZE, UNAME26 = 0x0040000, 0x0020000


def read_file(path):
    with open(path) as file:
        return file.read()


def write_file(path, text):
    with open(path, "w") as file:
        file.write(text)


def set_autogroup(nice):
    """The kernel lets whoever has no rights on the host do so every tenth of a second only, whoever did it last."""

    def attempt():
        try:
            write_file("/proc/self/autogroup", nice)
        except BlockingIOError:
            return False
        return True

    wait_for(attempt, "the autogroup")


def get_int(option):
    value = ctypes.c_int()
    prctl(option, ctypes.addressof(value))
    return value.value


def limits(program):
    wanted = {
        resource.RLIMIT_NOFILE: (777, 900),
        resource.RLIMIT_CORE: (0, 4096),
        resource.RLIMIT_STACK: (6 << 20, 32 << 20),
        resource.RLIMIT_NPROC: (5000, 5001),
        resource.RLIMIT_CPU: (3000, 4000),
        resource.RLIMIT_FSIZE: (1 << 40, resource.RLIM_INFINITY),
        resource.RLIMIT_RTTIME: (1 << 30, 1 << 31),
        resource.RLIMIT_MSGQUEUE: (4000, 5000),
    }
    for limit, value in wanted.items():
        soft, hard = value
        old = resource.getrlimit(limit)[1]
        if old != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or hard > old):
            hard = old
        resource.setrlimit(limit, (min(soft, hard) if hard != resource.RLIM_INFINITY else soft, hard))
    program.same(
        "limits",
        lambda: [resource.getrlimit(limit) for limit in range(16)],
        lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),
    )


def scheduling(program):
    def attributes():
        buffer = ctypes.create_string_buffer(56)
        syscall(SYS_SCHED_GETATTR, 0, buffer, 56, 0)
        return struct.unpack("<IIQiI", buffer.raw[:24])

    os.sched_setscheduler(0, os.SCHED_BATCH | os.SCHED_RESET_ON_FORK, os.sched_param(0))
    os.setpriority(os.PRIO_PROCESS, 0, 7)
    program.same("policy and nice", attributes, lambda: os.setpriority(os.PRIO_PROCESS, 0, 8))

    def deadline(child):
        def whole():
            buffer = ctypes.create_string_buffer(48)
            syscall(SYS_SCHED_GETATTR, 0, buffer, 48, 0)
            return struct.unpack("<IIQiIQQQ", buffer.raw)

        attributes = struct.pack("<IIQiIQQQ", 48, 6, 0, 0, 0, 2_000_000, 20_000_000, 40_000_000)
        try:
            syscall(SYS_SCHED_SETATTR, 0, attributes, 0)
        except PermissionError:
            os.setpriority(os.PRIO_PROCESS, 0, 13)  # not allowed in a user namespace
        child.same("policy", whole, lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)))

    program.child("deadline", deadline)  # such a task may not be bound to a processor
    os.sched_setaffinity(0, {0})
    program.same(
        "affinity",
        lambda: os.sched_getaffinity(0),
        lambda: os.sched_setaffinity(0, {0, 1} if (os.cpu_count() or 1) > 1 else {0}),
    )
    syscall(SYS_IOPRIO_SET, 1, 0, 2 << 13 | 6)
    program.same(
        "ioprio", lambda: syscall(SYS_IOPRIO_GET, 1, 0), lambda: syscall(SYS_IOPRIO_SET, 1, 0, 3 << 13)
    )

    def idle(child):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        child.same("policy", attributes, lambda: os.setpriority(os.PRIO_PROCESS, 0, 9))

    program.child("idle", idle)

    def realtime(child):
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(3))
        except PermissionError:
            os.setpriority(os.PRIO_PROCESS, 0, 12)  # not allowed in a user namespace
        child.same("policy", attributes, lambda: os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)))

    program.child("realtime", realtime)


def settings(program):
    write_file("/proc/self/oom_score_adj", "345")
    program.same(
        "oom_score_adj",
        lambda: read_file("/proc/self/oom_score_adj"),
        lambda: write_file("/proc/self/oom_score_adj", "400"),
    )
    write_file("/proc/self/coredump_filter", "0x7f")
    program.same(
        "coredump_filter",
        lambda: read_file("/proc/self/coredump_filter"),
        lambda: write_file("/proc/self/coredump_filter", "1"),
    )
    syscall(SYS_PERSONALITY, ADDR_NO_RANDOMIZE | UNAME26)
    program.same(
        "personality", lambda: syscall(SYS_PERSONALITY, 0xFFFFFFFF), lambda: syscall(SYS_PERSONALITY, 0)
    )
    prctl(PR_SET_TIMERSLACK, 123_456)
    program.same("timer slack", lambda: prctl(PR_GET_TIMERSLACK), lambda: prctl(PR_SET_TIMERSLACK, 99))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    program.same(
        "child subreaper", lambda: get_int(PR_GET_CHILD_SUBREAPER), lambda: prctl(PR_SET_CHILD_SUBREAPER, 0)
    )
    prctl(PR_SET_THP_DISABLE, 1)
    program.same("THP disable", lambda: prctl(PR_GET_THP_DISABLE), lambda: prctl(PR_SET_THP_DISABLE, 0))
    prctl(PR_SET_KEEPCAPS, 1)
    program.same("keep capabilities", lambda: prctl(PR_GET_KEEPCAPS), lambda: prctl(PR_SET_KEEPCAPS, 0))

    def private(child):
        prctl(PR_SET_PDEATHSIG, signal.SIGUSR2)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        child.same("pdeathsig", lambda: get_int(PR_GET_PDEATHSIG), lambda: prctl(PR_SET_PDEATHSIG, 0))
        prctl(PR_SET_DUMPABLE, 0)
        child.same("dumpable", lambda: prctl(PR_GET_DUMPABLE), lambda: prctl(PR_SET_DUMPABLE, 1))
        child.same(
            "nothing of the parent's",
            lambda: (get_int(PR_GET_CHILD_SUBREAPER), prctl(PR_GET_NO_NEW_PRIVS)),
            lambda: prctl(PR_SET_CHILD_SUBREAPER, 1),
        )

    program.child("private", private)
    program.same(
        "no_new_privs is the child's only",
        lambda: prctl(PR_GET_NO_NEW_PRIVS),
        lambda: prctl(PR_SET_NO_NEW_PRIVS, 1),
    )


def memory_settings(program):
    """What belongs to an address space, in a child of its own: not all of it can be taken back."""

    def get_policy():
        mode, nodes = ctypes.c_int(), ctypes.create_string_buffer(128)
        syscall(SYS_GET_MEMPOLICY, ctypes.addressof(mode), nodes, 1024, 0, 0)
        return mode.value, nodes.raw.rstrip(b"\0")

    def private(child):
        prctl(PR_MCE_KILL, 1, 1)
        child.same("memory error policy", lambda: prctl(PR_MCE_KILL_GET), lambda: prctl(PR_MCE_KILL, 0))
        syscall(SYS_SET_MEMPOLICY, MPOL_BIND, struct.pack("<Q", 1), 64)
        child.same("memory policy", get_policy, lambda: syscall(SYS_SET_MEMPOLICY, 0, 0, 0))
        syscall(SYS_MEMBARRIER, REGISTER_PRIVATE_EXPEDITED, 0, 0)
        child.same(
            "membarrier",
            lambda: (
                syscall(SYS_MEMBARRIER, GET_REGISTRATIONS, 0, 0),
                syscall(SYS_MEMBARRIER, PRIVATE_EXPEDITED, 0, 0),
            ),
            lambda: syscall(SYS_MEMBARRIER, REGISTER_GLOBAL_EXPEDITED, 0, 0),
        )
        prctl(PR_SET_MEMORY_MERGE, 1)
        child.same("memory merge", lambda: prctl(PR_GET_MEMORY_MERGE), lambda: prctl(PR_SET_MEMORY_MERGE, 0))
        prctl(PR_SET_MDWE, 1)
        expected = [1]

        def denies():
            try:
                mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close()
            except PermissionError:
                return None if prctl(PR_GET_MDWE) == expected[0] else f"is {prctl(PR_GET_MDWE)}"
            return "writable executable memory was given"

        child.check("memory-deny-write-execute", denies, expected.clear)

    program.child("memory", private)

    def in_a_session(child):
        os.setsid()
        set_autogroup("7")
        child.same(
            "autogroup nice",
            lambda: read_file("/proc/self/autogroup").split()[-1],
            lambda: set_autogroup("9"),
        )

    program.child("session", in_a_session)


def log_in():
    """Take a login uid, which only who has none may; the tests compare it from outside."""
    first, _, count = map(int, read_file("/proc/self/uid_map").split()[:3])
    write_file("/proc/self/loginuid", str(first + min(count - 1, 7)))


def body(program):
    log_in()
    limits(program)
    settings(program)
    memory_settings(program)
    scheduling(program)


main(body)
