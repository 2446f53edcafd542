"""Signal actions, masks, pending signals with siginfo, alternate stacks, itimers, POSIX timers, stopped processes."""

import ctypes
import os
import signal
import struct
import threading
import time

from support import main, status, syscall, wait_for

SYS_RT_SIGACTION, SYS_SIGALTSTACK, SYS_RT_SIGQUEUEINFO, SYS_RT_TGSIGQUEUEINFO = 13, 131, 129, 297
SYS_TIMER_CREATE, SYS_TIMER_SETTIME, SYS_TIMER_GETTIME = 222, 223, 224
SYS_TIMER_DELETE, SYS_GETTID = 226, 186
SI_QUEUE = -1
RT = signal.SIGRTMIN


def action(number):
    """The kernel's own view of an action: handler, flags, restorer, mask."""
    buffer = ctypes.create_string_buffer(32)
    syscall(SYS_RT_SIGACTION, number, None, buffer, 8)
    return struct.unpack("<4Q", buffer.raw)


def queue(number, value):
    """sigqueue(3) to this process, with a value."""
    info = struct.pack("<iiiiiiQ", number, 0, SI_QUEUE, 0, os.getpid(), os.getuid(), value).ljust(128, b"\0")
    syscall(SYS_RT_SIGQUEUEINFO, os.getpid(), number, info)


def queue_thread(tid, number, value):
    info = struct.pack("<iiiiiiQ", number, 0, SI_QUEUE, 0, os.getpid(), os.getuid(), value).ljust(128, b"\0")
    syscall(SYS_RT_TGSIGQUEUEINFO, os.getpid(), tid, number, info)


def take(numbers):
    """All pending signals of `numbers`: (number, code, pid, uid, value), in order of delivery."""
    mask = struct.pack("<Q", sum(1 << (n - 1) for n in numbers))
    found = []
    while True:
        info = ctypes.create_string_buffer(128)
        try:
            syscall(128, mask, info, bytes(16), 8)
        except BlockingIOError:
            return found
        number, _, code, _, pid, uid, value = struct.unpack_from("<iiiiiiQ", info.raw)
        found.append((number, code, pid, uid, value))


def actions(program):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, lambda *_: program.heard.append("USR2"))
    program.heard = []
    # SA_RESTART | SA_NODEFER | SA_RESTORER, with a mask and Python's own handler and restorer
    handler, _, restorer, _ = action(signal.SIGUSR2)
    raw = struct.pack("<4Q", handler, 0x10000000 | 0x40000000 | 0x04000000, restorer, 0x0000_0042_0000_0400)
    syscall(SYS_RT_SIGACTION, signal.SIGUSR2, raw, None, 8)

    def handled():
        program.heard.clear()
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_for(lambda: program.heard, "the handler", 2)
        return program.heard

    program.same("handler runs", handled, lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN))


def pending(program):
    blocked = {signal.SIGUSR1, signal.SIGTERM, RT + 1, RT + 2}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked | {RT + 11})

    def fill():
        for value in (0xDEAD_BEEF_0000_0001, 2, 3):
            queue(RT + 1, value)
        queue(RT + 2, 4)
        os.kill(os.getpid(), signal.SIGUSR1)
        queue_thread(syscall(SYS_GETTID), RT + 2, 5)

    fill()
    before = take(blocked)
    fill()

    def same():
        found = take(blocked)
        fill()
        return None if found == before else f"was {before}, is {found}"

    program.check("pending, with siginfo", same, lambda: queue(RT + 1, 9))
    program.same("pending sets", lambda: (status("SigPnd"), status("ShdPnd")), lambda: queue(RT + 11, 1))


def other_thread(program):
    """A thread with a mask, a pending signal and an alternate stack of its own."""
    go = threading.Event()
    results = {}

    def run():
        signal.pthread_sigmask(signal.SIG_BLOCK, {RT + 5, signal.SIGWINCH})
        area = ctypes.create_string_buffer(65536)
        wanted = struct.pack("<QiIQ", ctypes.addressof(area), 0, 0, 65536)
        syscall(SYS_SIGALTSTACK, wanted, None)
        results["tid"] = syscall(SYS_GETTID)
        queue_thread(results["tid"], RT + 5, 0x55)
        while True:
            now = ctypes.create_string_buffer(24)
            syscall(SYS_SIGALTSTACK, None, now)
            results["now"] = (
                now.raw,
                signal.pthread_sigmask(signal.SIG_BLOCK, ()),
                status("SigPnd", f"self/task/{results['tid']}"),
            )
            if go.is_set():
                take({RT + 5})
            time.sleep(0.01)

    threading.Thread(target=run, daemon=True).start()
    wait_for(lambda: "now" in results, "the thread")

    def fresh():
        results.pop("now")
        return wait_for(lambda: results.get("now"), "the thread", 2)

    program.same("a thread's stack, mask, pending", fresh, lambda: go.set() or time.sleep(0.1))


def interval_timers(program):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 4000, 11)
    signal.setitimer(signal.ITIMER_VIRTUAL, 5000, 0)
    signal.setitimer(signal.ITIMER_PROF, 6000, 13)
    begin = time.monotonic()

    def near(which, value_s, interval_s, passes):
        def run():
            left, interval = signal.getitimer(which)
            passed = time.monotonic() - begin if passes else 0
            if interval != interval_s or abs(value_s - passed - left) > 4:
                return f"{left} s left after {passed} s, interval {interval} s"
            return None

        return run

    program.check(
        "ITIMER_REAL",
        near(signal.ITIMER_REAL, 4000, 11, True),
        lambda: signal.setitimer(signal.ITIMER_REAL, 0),
    )
    program.check(
        "ITIMER_VIRTUAL",
        near(signal.ITIMER_VIRTUAL, 5000, 0, False),
        lambda: signal.setitimer(signal.ITIMER_VIRTUAL, 5),
    )
    program.check(
        "ITIMER_PROF",
        near(signal.ITIMER_PROF, 6000, 13, False),
        lambda: signal.setitimer(signal.ITIMER_PROF, 6000, 1),
    )


def posix_timers(program):
    def create(clock, notify, number, value, thread=0):
        event = struct.pack("<Qiii", value, number, notify, thread).ljust(64, b"\0")
        identifier = ctypes.c_int(-1)
        syscall(SYS_TIMER_CREATE, clock, event, ctypes.byref(identifier))
        return identifier.value

    def arm(timer, value_ns, interval_ns):
        s = struct.pack("<4q", *divmod(interval_ns, 10**9), *divmod(value_ns, 10**9))
        syscall(SYS_TIMER_SETTIME, timer, 0, s, None)

    def settings():
        with open("/proc/self/timers") as file:
            return file.read().replace(f"pid.{os.getpid()}", "pid")

    throw_away = create(time.CLOCK_MONOTONIC, 1, 0, 0)
    far = create(time.CLOCK_MONOTONIC, 0, RT + 6, 0xFEED_0000_0000_BEEF)
    silent = create(time.CLOCK_REALTIME, 1, 0, 0)
    thread = create(time.CLOCK_BOOTTIME, 4, RT + 7, 3, syscall(SYS_GETTID))
    syscall(SYS_TIMER_DELETE, throw_away)  # a hole in the ids
    signal.pthread_sigmask(signal.SIG_BLOCK, {RT + 8})
    near = create(time.CLOCK_MONOTONIC, 0, RT + 8, 0x1234_5678_9ABC)
    arm(far, 5000 * 10**9, 3 * 10**9)
    arm(thread, 6000 * 10**9, 0)
    program.same("POSIX timers", settings, lambda: create(time.CLOCK_MONOTONIC, 1, 0, 0))

    def left(timer):
        buffer = ctypes.create_string_buffer(32)
        syscall(SYS_TIMER_GETTIME, timer, buffer)
        return struct.unpack("<4q", buffer.raw)

    begin = time.monotonic()

    def remaining():
        passed = time.monotonic() - begin
        found = left(far), left(thread), left(silent)
        right = (
            abs(found[0][2] + passed - 5000) < 4
            and found[0][0] == 3
            and abs(found[1][2] + passed - 6000) < 4
            and found[2] == (0, 0, 0, 0)
        )
        return None if right else f"{found} after {passed} s"

    program.check("POSIX timers: time left", remaining, lambda: arm(far, 50 * 10**9, 10**9))

    def fires():
        arm(near, 20_000_000, 0)
        return [x[:2] + x[4:] for x in wait_for(lambda: take({RT + 8}), "the timer", 2)]

    program.same("POSIX timer fires", fires, lambda: syscall(SYS_TIMER_DELETE, near))


def stopped(program):
    """A child stopped by SIGSTOP stays stopped, and goes on when told to."""
    read, write = os.pipe2(os.O_NONBLOCK)
    child = os.fork()
    if child == 0:
        while True:
            time.sleep(0.01)
            os.write(write, b"x")
    program.children.append(child)

    def stop():
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        drain()

    def drain():
        try:
            return os.read(read, 65536)
        except BlockingIOError:
            return b""

    stop()

    def state():
        with open(f"/proc/{child}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]

    def stands_then_goes():
        stood = drain()
        time.sleep(0.05)
        stood += drain()
        was = state()
        os.kill(child, signal.SIGCONT)
        goes = bool(wait_for(drain, "the child to go on", 2))
        stop()
        return stood, was, goes

    program.same("stopped", stands_then_goes, lambda: os.kill(child, signal.SIGCONT))


def body(program):
    actions(program)
    pending(program)
    interval_timers(program)
    posix_timers(program)
    other_thread(program)  # inherits a mask with all that the timers send
    stopped(program)
    program.same(
        "actions",
        lambda: {n: action(n) for n in range(1, 65)},
        lambda: signal.signal(signal.SIGWINCH, signal.SIG_IGN),
    )
    program.same("mask", lambda: status("SigBlk"), lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {RT + 9}))


main(body)
