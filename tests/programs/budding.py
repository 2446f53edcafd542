"""A family that changes once, when there is a file ``change`` in the directory, and says so by one named ``changed``.

Of the children of the gardener some end, collected or not, some execute another program, one of them with a child of
its own, and one founds a session; others are born: with the memory of their parent, which both go on to change, with
another program, in a session and a group of their own, and one that is dead already.

The argument behind the directory: MiB of the first process.
"""

import hashlib
import mmap
import os
import signal
import sys
import time

from support import Program, main, prctl, wait_for

PAGE = mmap.PAGESIZE
PAGES = 1024
PR_SET_PDEATHSIG = 1


def relations(pid):
    """What /proc says of a process: its name, state, parent, group and session."""
    try:
        with open(f"/proc/{pid}/stat", encoding="latin-1") as file:
            name, fields = file.read().split("(", 1)[1].rsplit(")", 1)
    except FileNotFoundError:
        return "gone"
    state, *others = fields.split()[:4]
    return (name, "Z" if state == "Z" else "alive", *others)


def idle():
    while True:
        time.sleep(0.5)


def forked(act):
    pid = os.fork()
    if pid == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        act()
        os._exit(1)
    return pid


def execute():
    os.execv("/bin/sleep", ["sleep", "1000"])


class Garden:
    """The memory that is handed down, and the processes that are watched."""

    def __init__(self):
        self.soil = bytearray(os.urandom(PAGES * PAGE))
        self.pids = {}

    def dig(self, first):
        """Change every seventh page."""
        for page in range(first, PAGES, 7):
            self.soil[page * PAGE] ^= 0xFF

    def watch(self, program):
        def spoil():
            self.soil[-1] ^= 1

        program.same("soil", lambda: hashlib.sha256(self.soil).hexdigest(), spoil)


def founding(program):
    """A child that is in a session of its own when the family has changed."""

    def found():
        program.wait_file("change")
        os.setsid()
        idle()

    return forked(found)


def lead_group(program):
    """Of a group that a sibling is in, too, and by another program when the family has changed."""
    os.setpgid(0, 0)
    program.put("group", "")
    program.wait_file("change")
    execute()


def join_group(leader):
    os.setpgid(0, leader)
    idle()


def old_family(program):
    def then(act):
        def wait():
            program.wait_file("change")
            act()

        return forked(wait)

    def branch():
        twig = forked(idle)
        program.put("twig", str(twig))
        program.wait_file("change")
        execute()

    pids = {
        "stays": forked(idle),
        "collected": then(lambda: os._exit(3)),
        "dead": then(lambda: os._exit(7)),
        "executes": then(execute),
        "branch": forked(branch),
        "founder": founding(program),
        "first of a group": forked(lambda: lead_group(program)),
    }
    program.wait_file("group")
    pids["second of it"] = forked(lambda: join_group(pids["first of a group"]))
    wait_for(lambda: os.getpgid(pids["second of it"]) == pids["first of a group"], "the group")
    program.wait_file("twig")
    pids["twig"] = int(program.take("twig"))
    return pids


def new_family(garden, program):
    def lead():
        os.setsid()
        member = forked(idle)
        os.setpgid(member, member)
        program.put("member", str(member))
        idle()

    def budlet(program):
        garden.dig(3)
        garden.watch(program)

    def bud(program):
        garden.dig(2)
        garden.watch(program)
        program.child("budlet", budlet)

    def die():
        os._exit(9)

    garden.dig(0)
    program.child("bud", bud)
    garden.dig(1)
    pids = {
        "bud": program.answering[-1],
        "leader": forked(lead),
        "executed": forked(execute),
        "born dead": forked(die),
    }
    program.wait_file("member")
    pids["member"] = int(program.take("member"))
    return pids


def have_changed(pids):
    found = {name: relations(pid) for name, pid in pids.items()}
    return (
        found["collected"] == "gone"
        and all(found[name][1] == "Z" for name in ("dead", "born dead"))
        and all(found[name][0] == "sleep" for name in ("executes", "branch", "executed", "first of a group"))
        and all(found[name][4] == str(pids[name]) for name in ("founder", "leader"))
    )


def tend(directory):
    program, garden = Program("gardener", directory), Garden()
    pids = old_family(program)
    program.put("begun", "")
    while not program.exists("change"):
        time.sleep(0.005)
    os.waitpid(pids["collected"], 0)
    pids |= new_family(garden, program)
    wait_for(lambda: have_changed(pids), "the family's changes")
    garden.watch(program)

    def end_one():
        os.kill(pids["executed"], signal.SIGKILL)
        wait_for(lambda: relations(pids["executed"])[1] == "Z", "its end")

    program.same("family", lambda: {name: relations(pid) for name, pid in pids.items()}, end_one)

    def statuses():
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return [os.waitid(os.P_PID, pids[name], flags).si_status for name in ("dead", "born dead")]

    program.same("how they ended", statuses, lambda: os.waitpid(pids["dead"], 0))
    program.put("changed", "")
    program.serve()


def body(program):
    noise = bytearray(os.urandom((int(sys.argv[2]) if len(sys.argv) > 2 else 1) << 20))
    gardener = os.fork()
    if gardener == 0:
        tend(program.directory)
        os._exit(0)
    program.children.append(gardener)
    program.wait_file("begun")

    def spoil_noise():
        noise[len(noise) // 2] ^= 1

    program.same("memory", lambda: hashlib.sha256(noise).hexdigest(), spoil_noise)


main(body)
