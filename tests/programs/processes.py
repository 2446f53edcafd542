"""Width, depth, sessions, groups with dead leaders, zombies with their exact status, pids and parents."""

import os
import signal
import time

from support import main, prctl, status, syscall, wait_for


def relations(pid):
    with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
        name, fields = file.read().split("(", 1)[1].rsplit(")", 1)
    fields = fields.split()
    return name, fields[0], fields[1], fields[2], fields[3]  # comm, state, ppid, pgrp, session


def own_ids():
    return os.getpid(), os.getppid(), os.getpgid(0), os.getsid(0), syscall(186), status("NSpid")


def reap(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def leave_group():
    os.setpgid(0, 0)


def grandchild(program):
    program.same("ids", own_ids, leave_group)
    program.same("comm", lambda: relations("self")[0], lambda: prctl(15, b"other"))


def wide(program):
    prctl(15, b"wide ) comm (")
    for number in range(3):
        program.child(f"leaf{number}", grandchild)
    program.same("ids", own_ids, leave_group)
    program.same("comm", lambda: relations("self")[0], lambda: prctl(15, b"other"))


def session_leader(program):
    os.setsid()
    group = []
    # A group whose leader has died: two members remain, and the leader is reaped.
    leader = os.fork()
    if leader == 0:
        os.setpgid(0, 0)
        time.sleep(1000)
    wait_for(lambda: os.getpgid(leader) == leader, "the group leader")
    for _number in range(2):
        member = os.fork()
        if member == 0:
            os.setpgid(0, leader)
            while True:
                time.sleep(0.5)
        wait_for(lambda member=member: os.getpgid(member) == leader, "a group member")
        group.append(member)
        program.children.append(member)
    os.kill(leader, signal.SIGKILL)
    os.waitpid(leader, 0)
    program.same(
        "group without its leader", lambda: [os.getpgid(p) for p in group], lambda: os.setpgid(group[0], 0)
    )
    program.same("sessions", lambda: [os.getsid(p) for p in group], lambda: reap(group[1]))


def zombies(program):
    """Children that ended and are not reaped: exit codes, signals, and one that is in a group of its own."""
    expected = {}
    for code in (0, 7, 255):
        pid = os.fork()
        if pid == 0:
            prctl(15, b"dead %d" % code)
            os._exit(code)
        expected[pid] = code << 8
    for number in (signal.SIGTERM, signal.SIGKILL):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.kill(os.getpid(), number)
            os._exit(1)
        expected[pid] = number
    wait_for(lambda: all(relations(p)[1] == "Z" for p in expected), "zombies")
    ids = sorted(expected)
    program.same("as /proc shows them", lambda: [relations(p) for p in ids], lambda: os.waitpid(ids[0], 0))

    def peek(pid):
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return result.si_pid, result.si_code, result.si_status

    program.same("status", lambda: [peek(p) for p in ids], lambda: os.waitpid(ids[1], 0))
    # The last one is reaped for good, once; a spoilt test has no such child any more.
    final = {"done": False}

    def reap():
        if final["done"]:
            return None
        final["done"] = True
        pid = os.fork()
        if pid == 0:
            os._exit(3)
        found = os.waitpid(pid, 0)
        return None if found == (pid, 3 << 8) else f"a new child: {found}"

    def broken():
        final["done"] = False
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    program.check("new children", reap, broken)


def orphan_session(program):
    """A session whose leader has died, with its last member adopted by the subreaper above it."""
    prctl(36, 1)
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        last = os.fork()
        if last == 0:
            os.close(read)
            os.close(write)
            while True:
                time.sleep(0.5)
        os.write(write, b"%d" % last)
        os._exit(0)
    os.close(write)
    os.waitpid(middle, 0)
    with os.fdopen(read, "rb") as told:
        last = int(told.read())  # to its end: the last one has closed it, too
    program.children.append(last)
    program.same("adopted", lambda: relations(last)[2:], lambda: reap(last))


def deep(program, left=4):
    if left:
        program.child(f"deep{left}", lambda child: deep(child, left - 1))
    program.same("ids", own_ids, leave_group)


def body(program):
    program.child("wide", wide)
    program.child("session", session_leader)
    program.child("zombies", zombies)
    program.child("orphan", orphan_session)
    program.child("deep", deep)
    last = os.fork()
    if last == 0:
        while True:
            time.sleep(0.5)
    program.children.append(last)
    program.same(
        "children",
        lambda: [relations(p)[2:] for p in program.answering + program.children],
        lambda: reap(last),
    )


main(body)
