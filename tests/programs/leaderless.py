"""A process whose first thread has ended while others run: descriptors, memory, signals and children are all there."""

import contextlib
import ctypes
import mmap
import os
import signal
import threading
import time

from support import main, status, syscall, wait_for

SYS_EXIT, SYS_GETTID = 60, 186


def state(pid, thread=None):
    with open(f"/proc/{pid}/task/{thread or pid}/stat", encoding="latin-1") as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], fields[1:4], fields[-1]  # state; ppid, pgrp, session; exit code


def work(program, area, caught, kids):
    leader = os.getpid()
    wait_for(lambda: state(leader)[0] == "Z", "the end of the first thread")
    program.same(
        "thread ids", lambda: (os.getpid(), syscall(SYS_GETTID)), lambda: setattr(os, "getpid", lambda: 1)
    )
    program.same("memory", lambda: bytes(area[:8]), lambda: area.seek(0) or area.write(b"broken"))
    read, write = os.pipe()
    os.write(write, b"in the pipe")

    def through_pipe():
        found = os.read(read, 100)
        os.write(write, found)
        return found

    program.same("descriptors", through_pipe, lambda: os.write(write, b"?"))
    program.same("directory", os.getcwd, lambda: os.chdir("/proc"))

    def signalled():
        caught.clear()
        os.kill(leader, signal.SIGUSR1)
        return None if caught.wait(2) else "no handler was called"

    program.check("signals", signalled, libc_ignore)
    kid = os.fork()
    if kid == 0:
        while True:
            time.sleep(0.05)
    kids.append(kid)
    program.same(
        "child",
        lambda: (state(kid)[1], os.waitpid(kid, os.WNOHANG)),
        lambda: os.kill(kid, signal.SIGKILL) or time.sleep(0.1),
    )


def libc_ignore():
    """Ignore the signal for the whole process; Python itself lets only its main thread do so."""
    action = (ctypes.c_ulong * 4)(1, 0, 0, 0)
    syscall(13, int(signal.SIGUSR1), action, 0, 8)


def body(program):
    def leaderless(child):
        os.chdir("/tmp")
        area = mmap.mmap(-1, 4096)
        area.write(b"precious")
        caught = threading.Event()
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGUSR1, lambda *_: None)

        def listen():
            while os.read(reader, 1):
                caught.set()

        def serve():
            kids = []
            try:
                work(child, area, caught, kids)
                with contextlib.suppress(ValueError):  # signal.signal is for the main thread
                    child.serve()
            finally:
                for kid in kids:
                    with contextlib.suppress(ProcessLookupError, ChildProcessError):
                        os.kill(kid, signal.SIGKILL)
                        os.waitpid(kid, 0)
                os._exit(0)

        for target in (listen, serve):
            threading.Thread(target=target, daemon=True).start()
        syscall(SYS_EXIT, 5)

    pid = program.child("leaderless", leaderless)
    program.same(
        "as /proc shows it",
        lambda: (state(pid), status("Threads", pid), status("State", pid), os.waitpid(pid, os.WNOHANG)),
        lambda: os.setpgid(pid, pid),
    )


main(body)
