"""Ids of all four kinds, groups, five capability sets, securebits, no_new_privs: by process and by thread."""

import os
import struct
import threading
import time

from support import main, prctl, status, syscall, wait_for

SYS_CAPSET, SYS_SETFSUID, SYS_SETFSGID = 126, 122, 123
SYS_SETRESUID, SYS_SETRESGID, SYS_GETTID = 117, 119, 186
PR_CAPBSET_DROP, PR_GET_SECUREBITS, PR_SET_SECUREBITS = 24, 27, 28
PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_SET_NO_NEW_PRIVS = 8, 47, 38
PR_CAP_AMBIENT_RAISE = 2
CAP_KILL, CAP_SETUID, CAP_NET_BIND_SERVICE = 5, 7, 10
FIELDS = "Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs"
V3 = 0x20080522


def everything(task="self"):
    return [status(field, task) for field in FIELDS] + [prctl(PR_GET_SECUREBITS)]


def set_caps(effective, permitted, inheritable):
    header = struct.pack("<Ii", V3, 0)
    words = []
    for shift in (0, 32):
        words += [x >> shift & 0xFFFFFFFF for x in (effective, permitted, inheritable)]
    syscall(SYS_CAPSET, header, struct.pack("<6I", *words))


def bits(*numbers):
    return sum(1 << n for n in numbers)


def full_root(program):
    program.same("ids and capabilities", everything, lambda: prctl(PR_CAPBSET_DROP, 30))


def user(program):
    os.setgroups([5, 6, 7, 44])
    os.setresgid(11, 12, 13)
    os.setresuid(21, 22, 23)
    program.same("ids and capabilities", everything, lambda: os.setresuid(-1, 21, -1))
    program.same(
        "from inside",
        lambda: (os.getresuid(), os.getresgid(), os.getgroups()),
        lambda: os.setresuid(-1, 23, -1),
    )


def keeps_capabilities(program):
    prctl(PR_CAPBSET_DROP, 25)
    prctl(PR_SET_KEEPCAPS, 1)
    os.setresgid(14, 14, 14)
    os.setresuid(31, 31, 31)
    some = bits(CAP_KILL, CAP_NET_BIND_SERVICE, CAP_SETUID)
    set_caps(bits(CAP_KILL, CAP_NET_BIND_SERVICE), some, bits(CAP_KILL, CAP_SETUID))
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_KILL)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program.same("ids and capabilities", everything, lambda: set_caps(0, some, 0))


def filesystem_ids(program):
    syscall(SYS_SETFSGID, 16)
    syscall(SYS_SETFSUID, 41)
    program.same("ids and capabilities", everything, lambda: syscall(SYS_SETFSUID, 42))


def secure_bits(program):
    # NO_SETUID_FIXUP and its lock, NOROOT
    prctl(PR_SET_SECUREBITS, 1 << 2 | 1 << 3 | 1 << 0)
    os.setresuid(51, 51, 0)
    program.same("ids and capabilities", everything, lambda: prctl(PR_SET_SECUREBITS, 1 << 2 | 1 << 3))


def threads_differ(program):
    """A thread with ids of its own: raw system calls change one task only."""
    tids = []

    def run():
        syscall(SYS_SETRESGID, 17, 17, 17)
        syscall(SYS_SETRESUID, 61, 62, 63)
        tids.append(syscall(SYS_GETTID))
        while len(tids) == 1:
            time.sleep(0.01)
        syscall(SYS_SETRESUID, -1, 61, -1)
        tids.append(0)
        while True:
            time.sleep(1)

    threading.Thread(target=run, daemon=True).start()
    wait_for(lambda: tids, "the thread")
    program.same(
        "the thread's",
        lambda: everything(f"self/task/{tids[0]}"),
        lambda: tids.append(0) or wait_for(lambda: len(tids) == 3, "it"),
    )
    program.same("the leader's", lambda: everything("thread-self"), lambda: syscall(SYS_SETFSUID, 9))


def body(program):
    program.child("root", full_root)
    program.child("user", user)
    program.child("keeps", keeps_capabilities)
    program.child("fs", filesystem_ids)
    program.child("secure", secure_bits)
    program.child("threads", threads_differ)
    program.same("ids and capabilities", everything, lambda: prctl(PR_CAPBSET_DROP, 29))


main(body)
