"""Time, cgroup and pid namespaces of a process and of those for its children: clocks go on, names begin at the root.

Needs CAP_SYS_ADMIN in its user namespace. The first child is born before the time namespace for
children is made, the second after it, and a third in a pid namespace that has ended meanwhile.
"""

import os
import time

from support import libc, main

CLONE_NEWCGROUP, CLONE_NEWTIME, CLONE_NEWPID = 0x02000000, 0x80, 0x20000000
AHEAD_S = 500_000
#: between two looks at different clocks
SLACK_S = 1.5


def call(function, *args):
    if function(*args) == -1:
        raise OSError(f"{function.__name__}{args}")


def clocks():
    return [time.clock_gettime(c) for c in (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME, time.CLOCK_REALTIME)]


def goes_on(ahead):
    """Clocks never go back, and not faster than the time of day."""
    begin = clocks()

    def run():
        now = clocks()
        passed = [a - b for a, b in zip(now, begin, strict=True)]
        if min(passed[:2]) < 0 or max(passed[:2]) > passed[2] + SLACK_S:
            return f"clocks went on by {passed}"
        inside = now[0] > AHEAD_S
        return None if inside == ahead else f"monotonic clock says {now[0]}, ahead: {ahead}"

    return run


def cgroup_names():
    with open("/proc/self/cgroup") as file:
        return [line.split(":", 2)[2] for line in file]


def body(program):
    broken = []

    def spoil():
        broken.append(1)

    def or_broken(run):
        return lambda: "spoilt" if broken else run()

    def namespaces():
        found = []
        for kind in ("time", "time_for_children", "pid", "cgroup"):
            try:
                found.append(os.stat(f"/proc/self/ns/{kind}").st_ino)
            except OSError:
                found.append(None)
        return found[0] == found[1], len(set(found)), list(broken)

    def before(child):
        child.check("clocks", or_broken(goes_on(False)), spoil)
        child.same("namespaces", namespaces, spoil)

    def after(child):
        child.check("clocks", or_broken(goes_on(True)), spoil)
        child.same("namespaces", namespaces, spoil)

    call(libc.unshare, CLONE_NEWCGROUP)
    program.child("before", before)
    call(libc.unshare, CLONE_NEWTIME)
    with open("/proc/self/timens_offsets", "w") as file:
        file.write(f"monotonic {AHEAD_S} 5\nboottime {2 * AHEAD_S} 999999999\n")
    program.child("after", after)
    # nobody lives in the pid namespace for further children: a fork fails with ENOMEM
    call(libc.unshare, CLONE_NEWPID)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    program.check("clocks", or_broken(goes_on(False)), spoil)
    program.same("namespaces", namespaces, spoil)
    program.same("cgroup", lambda: (cgroup_names(), list(broken)), spoil)
    program.check("no more children", or_broken(cannot_fork), spoil)


def cannot_fork():
    try:
        child = os.fork()
    except OSError as error:
        return None if error.errno == 12 else f"fork: {error}"
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "a fork succeeded"


main(body)
