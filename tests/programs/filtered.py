"""Seccomp: filters that answer with an errno, stacked, per thread, inherited."""

import ctypes
import struct
import threading
import time

from support import main, prctl, status, syscall, wait_for

SYS_SECCOMP, SYS_GETTID, SYS_GETPPID, SYS_GETPGID, SYS_UNAME = 317, 186, 110, 121, 63
SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_TSYNC, SECCOMP_FILTER_FLAG_LOG = 1, 2
SYS_SYSINFO = 99
PR_SET_NO_NEW_PRIVS = 38
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, ERRNO = 0x7FFF0000, 0x00050000


def deny(number, code, flags=0):
    """A filter that answers system call `number` with errno `code` and lets all others pass."""
    program = [(LOAD, 0, 0, 0), (EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | code), (RETURN, 0, 0, ALLOW)]
    code_bytes = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    fprog = struct.pack("<H6xQ", len(program), ctypes.addressof(code_bytes))
    return syscall(SYS_SECCOMP, SECCOMP_SET_MODE_FILTER, flags, fprog)


def error_of(number, *args):
    try:
        syscall(number, *args)
    except OSError as error:
        return error.errno
    return 0


def what_is_denied():
    return error_of(SYS_GETPPID), error_of(SYS_GETPGID, 0), error_of(SYS_UNAME, bytes(390))


def fields(task="self"):
    return [status(name, task) for name in ("Seccomp", "Seccomp_filters", "NoNewPrivs")]


def body(program):
    def spoil():
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        deny(SYS_GETPPID, 99)

    program.same("the parent is not filtered", lambda: (fields()[0], error_of(SYS_GETPPID)), spoil)

    def filtered(child):
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        deny(SYS_GETPPID, 77)
        deny(SYS_GETPGID, 66)
        child.same("denied", lambda: (what_is_denied(), fields()), lambda: deny(SYS_UNAME, 55))
        tids = []

        def run():
            deny(SYS_UNAME, 44)
            tids.append(syscall(SYS_GETTID))
            results = {}
            answers.append(results)
            while True:
                results["now"] = what_is_denied()
                time.sleep(0.01)
                if asked.is_set():
                    deny(SYS_UNAME, 33)
                    asked.clear()

        answers, asked = [], threading.Event()
        threading.Thread(target=run, daemon=True).start()
        wait_for(lambda: answers and answers[0], "the thread")

        def of_thread():
            answers[0].clear()
            return wait_for(lambda: answers[0].get("now"), "the thread", 2), fields(f"self/task/{tids[0]}")

        child.same("denied in a thread", of_thread, lambda: asked.set() or time.sleep(0.1))

    program.child("filtered", filtered)

    def synchronized(child):
        """A thread has one filter more than the others; it can still give all of its own to them."""
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        deny(SYS_GETPPID, 77)
        deny(SYS_GETPGID, 66)
        filtered, asked, answers, broken = threading.Event(), threading.Event(), [], []

        def run():
            deny(SYS_UNAME, 44, SECCOMP_FILTER_FLAG_LOG)
            filtered.set()
            while True:
                asked.wait()
                asked.clear()
                answers.append(deny(SYS_SYSINFO, 40 + len(answers), SECCOMP_FILTER_FLAG_TSYNC))

        threading.Thread(target=run, daemon=True).start()
        filtered.wait()

        def synchronize():
            before = len(answers)
            asked.set()
            result = wait_for(lambda: answers[before:], "the thread", 2)[0]
            denied = error_of(SYS_SYSINFO, bytes(200))
            return (
                None if (result, denied) == (0, 40 + before) and not broken else f"{result}, errno {denied}"
            )

        child.check("synchronized", synchronize, lambda: broken.append(1))

    program.child("synchronized", synchronized)


main(body)
