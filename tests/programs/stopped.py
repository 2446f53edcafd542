"""Job control: who is stopped, by which signal, with all threads; what the parent has collected of it and what not."""

import os
import signal
import threading
import time

from support import main, wait_for

WHATEVER = os.WSTOPPED | os.WCONTINUED | os.WNOHANG | os.WNOWAIT


def state(pid, thread=None):
    with open(f"/proc/{pid}/task/{thread or pid}/stat", encoding="latin-1") as file:
        return file.read().rpartition(")")[2].split()[0]


def sleep_on():
    while True:
        time.sleep(0.02)


def start(program, own_group=False, threads=0):
    pid = os.fork()
    if pid == 0:
        if own_group:
            os.setpgid(0, 0)
        for _ in range(threads):
            threading.Thread(target=sleep_on, daemon=True).start()
        sleep_on()
    program.children.append(pid)
    if own_group:
        wait_for(lambda: os.getpgid(pid) == pid, "its group")
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/task")) == threads + 1, "its threads")
    return pid


def stop(pid, number=signal.SIGSTOP):
    os.kill(pid, number)
    wait_for(lambda: state(pid) == "T", "the stop")


def go_on(pid):
    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: state(pid) != "T", "the continuation")


def collect(pid):
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED)


def to_collect(pid):
    """What waitid would say, without taking it."""
    found = os.waitid(os.P_PID, pid, WHATEVER)
    return None if found is None else (found.si_pid, found.si_code, found.si_status)


def pending():
    return sorted(signal.sigpending())


def body(program):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    uncollected = start(program, own_group=True)
    collected = start(program, own_group=True, threads=3)
    plain = start(program)
    continued = start(program)
    heard = start(program)
    stop(uncollected, signal.SIGTTIN)
    stop(collected, signal.SIGTSTP)
    collect(collected)
    stop(plain)
    collect(plain)
    for pid in (continued, heard):
        stop(pid)
        go_on(pid)
    collect(heard)
    time.sleep(0.05)  # each SIGCHLD is there
    while signal.sigtimedwait([signal.SIGCHLD], 0):
        pass

    def both(pid):
        return lambda: (state(pid), to_collect(pid))

    program.same("stopped, not collected", both(uncollected), lambda: collect(uncollected))
    program.same("stopped and collected", both(collected), lambda: (go_on(collected), stop(collected)))
    program.same(
        "threads",
        lambda: [
            state(collected, thread) for thread in sorted(map(int, os.listdir(f"/proc/{collected}/task")))
        ],
        lambda: go_on(collected),
    )
    program.same("stopped by SIGSTOP", both(plain), lambda: go_on(plain))
    program.same("continued, not collected", lambda: to_collect(continued), lambda: collect(continued))
    program.same("continued and collected", lambda: to_collect(heard), lambda: (stop(heard), go_on(heard)))
    program.same("no signal of it", pending, lambda: os.kill(os.getpid(), signal.SIGCHLD))

    def runs_on():
        go_on(plain)
        if to_collect(plain) != (plain, os.CLD_CONTINUED, signal.SIGCONT):
            return f"after SIGCONT: {to_collect(plain)}"
        collect(plain)
        stop(plain)
        if to_collect(plain) != (plain, os.CLD_STOPPED, signal.SIGSTOP):
            return f"after SIGSTOP: {to_collect(plain)}"
        collect(plain)
        while signal.sigtimedwait([signal.SIGCHLD], 0.05):
            pass
        return None

    def end():
        os.kill(plain, signal.SIGKILL)

    program.check("runs on", runs_on, end)


main(body)
