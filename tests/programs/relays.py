"""Threads: when there is a file ``change`` in the directory, some end and others begin; a child leads at ``lead``.

Each is asked in itself: what it is called, its number, what it alone knows, and its directory, of which two have their
own: one from the beginning, one from the change on.
"""

import os
import queue
import threading
import time

from support import DIRECTORY, call, libc, main, prctl, syscall

NR_GETTID = 186
PR_SET_NAME = 15
CLONE_FS = 0x200
BEGIN, LEAVE, COME = (
    ["apart", "first", "one", "middle", "two", "parts", "three"],
    ["first", "middle"],
    ["new", "newer"],
)


class Relay:
    """A thread that answers what it is asked."""

    def __init__(self, name):
        self.name = name
        self.known = threading.local()
        self.asked = queue.SimpleQueue()
        self.answers = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.before = self.ask(self.say)

    def run(self):
        prctl(PR_SET_NAME, self.name.encode() + b"\0")
        self.known.word = f"of {self.name}"
        while (act := self.asked.get()) is not None:
            try:
                self.answers.put(act())
            except OSError as error:
                self.answers.put(error)

    def ask(self, act):
        self.asked.put(act)
        answer = self.answers.get(timeout=20)
        if isinstance(answer, OSError):
            raise answer
        return answer

    def say(self):
        with open("/proc/thread-self/comm") as file:
            return file.read().strip(), syscall(NR_GETTID), self.known.word, os.getcwd()

    def part(self, name):
        """Get a directory of its own."""
        call(libc.unshare, CLONE_FS)
        os.makedirs(f"{DIRECTORY}/{name}")
        os.chdir(f"{DIRECTORY}/{name}")

    def differs(self):
        now = self.ask(self.say)
        return None if now == self.before else f"{self.name} was {self.before}, is {now}"

    def end(self):
        self.asked.put(None)
        self.thread.join()


def when(program, name, act):
    """In a thread: act when there is a file of that name; then there is one called NAME-done."""

    def wait():
        while not program.exists(name):
            time.sleep(0.01)
        act()
        program.put(f"{name}-done", "")

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def check(program, relays, waiting):
    """Just these threads are there, and none of them differs."""

    def threads():
        there = {int(name) for name in os.listdir("/proc/self/task")}
        wanted = {os.getpid(), *(relay.before[1] for relay in relays.values())}
        if waiting.is_alive():
            wanted.add(waiting.native_id)
        if there != wanted:
            return f"there are {sorted(there)} instead of {sorted(wanted)}"
        return "; ".join(filter(None, (relay.differs() for relay in list(relays.values())))) or None

    program.check("threads", threads, relays["one"].end)


def child(program):
    """Its threads stay; it gets a process group of its own."""
    relays = {name: Relay(name) for name in ("one", "two")}
    groups = [os.getpgrp()]

    def lead():
        os.setpgid(0, 0)
        groups[0] = os.getpid()

    check(program, relays, when(program, "lead", lead))
    program.check(
        "process group",
        lambda: None if os.getpgrp() == groups[0] else f"is {os.getpgrp()} instead of {groups[0]}",
        groups.clear,
    )


def body(program):
    program.child("child", child)
    relays = {name: Relay(name) for name in BEGIN}
    relays["apart"].ask(lambda: relays["apart"].part("apart"))
    relays["apart"].before = relays["apart"].ask(relays["apart"].say)

    def change():
        for name in LEAVE:
            relays.pop(name).end()
        relays["parts"].ask(lambda: relays["parts"].part("parts"))
        relays["parts"].before = relays["parts"].ask(relays["parts"].say)
        for name in COME:
            relays[name] = Relay(name)

    check(program, relays, when(program, "change", change))


main(body)
