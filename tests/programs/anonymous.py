"""eventfd, epoll, timerfd, signalfd, memfd, pidfd: state, and that they still work."""

import ctypes
import fcntl
import os
import select
import signal
import struct
import threading
import time

from support import main, syscall

EFD_SEMAPHORE = 1
SYS_RT_SIGQUEUEINFO, SYS_PIDFD_OPEN, PIDFD_THREAD = 129, 434, os.O_EXCL
SYS_TIMERFD_CREATE, SYS_TIMERFD_SETTIME, SYS_TIMERFD_GETTIME, SYS_SIGNALFD4 = 283, 286, 287, 289
MFD_ALLOW_SEALING, F_ADD_SEALS, F_GET_SEALS = 2, 1033, 1034


def eventfds(program):
    plain = os.eventfd(0xFFFF_FFFF, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.eventfd_write(plain, 1 << 40)

    def value():
        found = os.eventfd_read(plain)
        os.eventfd_write(plain, found)
        return found

    program.same("eventfd", value, lambda: os.eventfd_write(plain, 1))
    semaphore = os.eventfd(5, EFD_SEMAPHORE)

    def one():
        found = os.eventfd_read(semaphore)
        os.eventfd_write(semaphore, 1)
        return found

    program.same("semaphore", one, lambda: os.dup2(os.eventfd(5), semaphore))
    program.same(
        "eventfd: flags",
        lambda: [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (plain, semaphore)],
        lambda: os.set_blocking(semaphore, False),
    )
    return plain


def epolls(program, event):
    read, write = os.pipe()
    epoll = select.epoll()
    epoll.register(read, select.EPOLLIN | select.EPOLLET)
    duplicate = os.dup(event)
    syscall(233, epoll.fileno(), 1, duplicate, struct.pack("<IQ", select.EPOLLIN, 0xDEAD_BEEF_0BAD_CAFE))
    nested = select.epoll()
    nested.register(epoll.fileno(), select.EPOLLIN)

    def watched():
        with open(f"/proc/self/fdinfo/{epoll.fileno()}") as file:
            return sorted(" ".join(line.split()[:6]) for line in file if line.startswith("tfd"))

    program.same("epoll: what it watches", watched, lambda: epoll.unregister(read))

    def data():
        buffer = ctypes.create_string_buffer(12 * 8)
        count = syscall(232, epoll.fileno(), buffer, 8, 0)
        events = [struct.unpack_from("<IQ", buffer, 12 * n) for n in range(count)]
        return (select.EPOLLIN, 0xDEAD_BEEF_0BAD_CAFE) in events

    program.same("epoll: data", data, lambda: os.eventfd_read(event))

    def edge():
        epoll.poll(0)
        os.write(write, b"x")
        first = (read, select.EPOLLIN) in epoll.poll(0)
        second = (read, select.EPOLLIN) in epoll.poll(0)
        os.read(read, 1)
        return first, second

    program.same("epoll: edge-triggered", edge, lambda: os.close(write))
    _, ready = os.pipe()
    full, blank = select.epoll(), select.epoll()
    full.register(ready, select.EPOLLOUT | select.EPOLLIN | select.EPOLLET)
    assert full.poll(0)
    program.same(
        "epoll: an edge that was reported",
        lambda: full.poll(0),
        lambda: full.modify(ready, select.EPOLLOUT | select.EPOLLET),
    )
    blank.register(ready, select.EPOLLOUT | select.EPOLLET)

    def reports():
        found = blank.poll(0)
        blank.modify(ready, select.EPOLLOUT | select.EPOLLET)
        return found

    program.same("epoll: an edge that was not reported", reports, lambda: blank.unregister(ready))
    program.same("epoll in epoll", lambda: [fd for fd, _ in nested.poll(0)], nested.close)

    program.keep = [epoll, nested, full, blank, ready]


def oneshot(program):
    read, write = os.pipe()
    epoll = select.epoll()
    epoll.register(read, select.EPOLLIN | select.EPOLLONESHOT)
    os.write(write, b"x")
    assert epoll.poll(0)
    program.same("epoll: one shot, fired", lambda: epoll.poll(0), lambda: epoll.modify(read, select.EPOLLIN))


def timerfds(program):
    def gettime(fd):
        buffer = ctypes.create_string_buffer(32)
        syscall(SYS_TIMERFD_GETTIME, fd, buffer)
        return struct.unpack("<4q", buffer.raw)

    def make(clock, interval_s, value_s, flags=0):
        fd = syscall(SYS_TIMERFD_CREATE, clock, os.O_NONBLOCK)
        setting = struct.pack("<4q", interval_s, 500 if interval_s else 0, value_s, 0)
        syscall(SYS_TIMERFD_SETTIME, fd, flags, setting, None)
        return fd

    far = make(time.CLOCK_MONOTONIC, 7, 5000)
    boot = make(time.CLOCK_BOOTTIME, 0, 6000)
    begin = time.monotonic()

    def remaining(fd, value_s):
        def run():
            seconds = gettime(fd)[2]
            passed = time.monotonic() - begin
            # what passes between dump and restore does not count for the timer
            return None if abs(value_s - passed - seconds) < 60 else f"{seconds} s left after {passed} s"

        return run

    program.same(
        "timerfd: interval",
        lambda: gettime(far)[:2],
        lambda: syscall(SYS_TIMERFD_SETTIME, far, 0, struct.pack("<4q", 1, 0, 5000, 0), None),
    )
    program.check(
        "timerfd: time left",
        remaining(far, 5000),
        lambda: syscall(SYS_TIMERFD_SETTIME, far, 0, struct.pack("<4q", 1, 0, 50, 0), None),
    )
    program.check(
        "timerfd: boot clock",
        remaining(boot, 6000),
        lambda: syscall(SYS_TIMERFD_SETTIME, boot, 0, struct.pack("<4q", 0, 0, 0, 0), None),
    )

    ticks = syscall(SYS_TIMERFD_CREATE, time.CLOCK_MONOTONIC, 0)
    syscall(SYS_TIMERFD_SETTIME, ticks, 0, struct.pack("<4q", 0, 20_000_000, 0, 20_000_000), None)

    def ticking():
        return (
            select.select([ticks], [], [], 2)[0] == [ticks] and struct.unpack("<Q", os.read(ticks, 8))[0] >= 1
        )

    program.same("timerfd: ticks", ticking, lambda: syscall(SYS_TIMERFD_SETTIME, ticks, 0, bytes(32), None))
    fired = make(time.CLOCK_REALTIME, 0, 1, 1)  # an absolute time long ago
    select.select([fired], [], [])  # which the kernel finds out by an interrupt
    program.same(
        "timerfd: expired, not read",
        lambda: select.select([fired], [], [], 0)[0] == [fired],
        lambda: os.read(fired, 8),
    )


def queue(number, value):
    """sigqueue(3) to itself."""
    info = struct.pack("<3i4xiIQ96x", number, 0, -1, os.getpid(), os.getuid(), value)
    syscall(SYS_RT_SIGQUEUEINFO, os.getpid(), number, info)


def signalfds(program):
    wanted = {signal.SIGUSR1, signal.SIGRTMIN + 3}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    mask = struct.pack("<Q", sum(1 << (s - 1) for s in wanted))
    fd = syscall(SYS_SIGNALFD4, -1, mask, 8, os.O_NONBLOCK | os.O_CLOEXEC)

    def arrives():
        os.kill(os.getpid(), signal.SIGUSR1)
        found = os.read(fd, 128)
        return struct.unpack_from("<I", found)[0], struct.unpack_from("<I", found, 12)[0] == os.getpid()

    def narrow():
        syscall(SYS_SIGNALFD4, fd, struct.pack("<Q", 1 << 20), 8, 0)

    program.same("signalfd", arrives, narrow)

    kept = signal.SIGRTMIN + 5
    signal.pthread_sigmask(signal.SIG_BLOCK, {kept})
    pending = syscall(SYS_SIGNALFD4, -1, struct.pack("<Q", 1 << (kept - 1)), 8, os.O_NONBLOCK | os.O_CLOEXEC)
    for value in (11, 22):
        queue(kept, value)

    def unread():
        ready = select.select([pending], [], [], 0)[0] == [pending]
        values = [struct.unpack_from("<i", os.read(pending, 128), 44)[0] for _ in range(2)]
        for value in values:
            queue(kept, value)
        return ready, values

    program.same("signalfd: signals that wait", unread, lambda: os.read(pending, 128))


def memfds(program):
    name = b"with a name"
    fd = os.memfd_create(name.decode(), MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.write(fd, b"sealed content" * 1000)
    os.lseek(fd, 3, os.SEEK_SET)
    fcntl.fcntl(fd, F_ADD_SEALS, 1 | 2 | 4 | 8)
    plain = os.memfd_create("plain", MFD_ALLOW_SEALING)
    os.ftruncate(plain, 1 << 20)
    os.pwrite(plain, b"x", 1 << 19)

    def replaced():
        return os.dup2(plain, fd)

    program.same(
        "memfd: sealed",
        lambda: (fcntl.fcntl(fd, F_GET_SEALS), os.pread(fd, 1 << 20, 0), os.lseek(fd, 0, 1)),
        replaced,
    )
    program.same("memfd: name", lambda: os.readlink(f"/proc/self/fd/{fd}"), replaced)
    program.same(
        "memfd: not sealed",
        lambda: (fcntl.fcntl(plain, F_GET_SEALS), os.fstat(plain).st_size, os.pread(plain, 3, 1 << 19)),
        lambda: os.pwrite(plain, b"y", 1 << 19),
    )


def field(fd, name):
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return [line.split()[-1] for line in file if line.startswith(f"{name}:")]


def pidfds(program):
    def body(child):
        broken = []
        child.same("pid", lambda: (os.getpid(), list(broken)), lambda: broken.append(1))

    pid = program.child("watched", body)
    fd = os.pidfd_open(pid)

    def names():
        with open(f"/proc/self/fdinfo/{fd}") as file:
            return [line for line in file if line.startswith("Pid:")]

    program.same("pidfd", names, lambda: os.dup2(os.pidfd_open(os.getpid()), fd))
    thread = threading.Thread(target=signal.pause, daemon=True)
    thread.start()
    try:
        of_thread = syscall(SYS_PIDFD_OPEN, thread.native_id, PIDFD_THREAD)
    except OSError:  # before Linux 6.9
        pass
    else:
        program.same(
            "pidfd of a thread",
            lambda: (field(of_thread, "NSpid"), select.select([of_thread], [], [], 0)[0]),
            lambda: os.dup2(fd, of_thread),
        )
    gone = os.fork()
    if gone == 0:
        os._exit(3)
    of_gone = os.pidfd_open(gone)
    os.waitpid(gone, 0)

    def is_gone():
        return field(of_gone, "Pid"), select.select([of_gone], [], [], 0)[0] == [of_gone]

    program.same("pidfd of a process that is gone", is_gone, lambda: os.dup2(fd, of_gone))


def body(program):
    event = eventfds(program)
    epolls(program, event)
    oneshot(program)
    timerfds(program)
    signalfds(program)
    memfds(program)
    pidfds(program)


main(body)
