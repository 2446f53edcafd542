"""The program that moves: four processes on three levels of user namespaces that watch each other.

::

    level 0   conductor (two more threads)     http.server
                 |  pipe down, pipe up
    level 1   middle: pid 1 of its pid namespace, own mounts and host name
                 |  socket pair
    level 2   deep: one more user namespace inside

In each step the conductor sends a number down; every process checks that it is the
one after the last it saw, and that its pid, its uids and gids are what they were at
the start. Answers come back up and the conductor appends a line to the log. When the
host's name changes, maps and ``setgroups`` are looked at again, too. Anything that is
not as it was ends the tree with a line that says so.

Runs with nothing but the standard library and a copy of this package that every uid
may read; the interpreter may be the system's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import run
from pipeline.kernel.syscalls import CLONE

STEP_S = 0.01
PORT = 8000


class Fault(Exception):
    """Something is not as it was; the text says what."""


def send(fd: int, message: dict[str, Any]) -> None:
    """Write one message: its length in 4 bytes, then JSON."""
    data = json.dumps(message).encode()
    data = struct.pack("<I", len(data)) + data
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> dict[str, Any]:
    """Read one message.

    Raises:
        Fault: the other end is gone.
    """

    def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.read(fd, size - len(data))
            if not piece:
                raise Fault("the other end of a pipe or socket is gone")
            data += piece
        return data

    (size,) = struct.unpack("<I", exactly(4))
    message: dict[str, Any] = json.loads(exactly(size))
    return message


class Self:
    """What a process knows of itself, and must stay true.

    Args:
        name: how the process is called in the log.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._ids = self._see_ids()
        self._maps = self._see_maps()
        self._number: int | None = None

    @staticmethod
    def _see_ids() -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "uids": list(os.getresuid()),
            "gids": list(os.getresgid()),
            "groups": os.getgroups(),
        }

    @staticmethod
    def _see_maps() -> dict[str, str]:
        return {
            name: " ".join(Path(f"/proc/self/{name}").read_text(encoding="ascii").split())
            for name in ("uid_map", "gid_map", "setgroups")
        }

    def step(self, number: int, *, verify: bool) -> dict[str, Any]:
        """Check everything; returns the process's part of the log line.

        Raises:
            Fault: a step was lost or doubled, or an id or a map is another.
        """
        if self._number is not None and number != self._number + 1:
            raise Fault(f"{self.name}: step {number} came after {self._number}")
        self._number = number
        ids = self._see_ids()
        if ids != self._ids:
            raise Fault(f"{self.name}: ids are {ids} and were {self._ids}")
        part: dict[str, Any] = {"name": self.name, "count": number, **ids}
        if verify:
            maps = self._see_maps()
            if maps != self._maps:
                raise Fault(f"{self.name}: maps are {maps} and were {self._maps}")
            part |= maps
        return part


class Threads:
    """Threads that count by themselves.

    Args:
        number: how many.
    """

    def __init__(self, number: int) -> None:
        self.counts = [0] * number
        self._faults: list[str] = []
        for index in range(number):
            threading.Thread(target=self._count, args=(index,), daemon=True).start()

    def _count(self, index: int) -> None:
        tid, mine = threading.get_native_id(), 0
        while True:
            mine += 1
            self.counts[index] += 1
            if self.counts[index] != mine or threading.get_native_id() != tid:
                self._faults.append(f"thread {index}: count {self.counts[index]}, was {mine}; tid was {tid}")
            time.sleep(STEP_S)

    def check(self) -> list[int]:
        """The counts now.

        Raises:
            Fault: a thread found its count or its tid changed.
        """
        if self._faults:
            raise Fault(self._faults[0])
        return list(self.counts)


def start(level: str, users: list[run.IdMap], others: int, *words: object) -> int:
    """Start this file as another level; descriptors named in `words` must be inheritable."""
    command = [sys.executable, __file__, level, *map(str, words)]
    return run.start(command, run.Surroundings(users=users, others=others))


def conduct(work: Path, first_map: str, second_map: str) -> None:
    """Level 0: start everybody, step for ever."""
    log = os.open(work / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    web = ["-m", "http.server", str(PORT), "--bind", "0.0.0.0", "--directory", str(work / "www")]
    os.posix_spawn(sys.executable, [sys.executable, *web], os.environ)
    down_reader, down = os.pipe()
    up, up_writer = os.pipe()
    for fd in (down_reader, up_writer):
        os.set_inheritable(fd, True)
    others = CLONE.NEWPID | CLONE.NEWNS | CLONE.NEWUTS
    start("middle", [run.parse_map(first_map)], others, down_reader, up_writer, second_map)
    os.close(down_reader)
    os.close(up_writer)
    threads, myself = Threads(2), Self("conductor")
    number, host = 0, ""
    while True:
        number += 1
        now = socket.gethostname()
        verify, host = now != host, now
        line: dict[str, Any] = {"step": number, "at_s": time.monotonic(), "host": host, "verified": verify}
        try:
            mine = myself.step(number, verify=verify)
            send(down, {"step": number, "verify": verify})
            answer = receive(up)
            if "fault" in answer:
                raise Fault(answer["fault"])
            line |= {"threads": threads.check(), "processes": [mine, *answer["processes"]]}
        except Fault as fault:
            line["fault"] = str(fault)
        os.write(log, json.dumps(line).encode() + b"\n")
        if "fault" in line:
            sys.exit(1)
        time.sleep(STEP_S)


def answer(name: str, reader: int, writer: int, below: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Levels 1 and 2: take a step, pass it on below, answer above, for ever."""
    myself = Self(name)
    while True:
        request = receive(reader)
        try:
            mine = myself.step(request["step"], verify=request["verify"])
            reply = below(request)
            if "fault" not in reply:
                reply["processes"].insert(0, mine)
        except Fault as fault:
            reply = {"fault": str(fault)}
        send(writer, reply)


def middle(reader: int, writer: int, second_map: str) -> None:
    """Level 1: pid 1 of a pid namespace."""
    for fd in (reader, writer):
        os.set_inheritable(fd, False)
    socket.sethostname("inside")
    mine, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    start("deep", [run.parse_map(second_map)], 0, theirs.fileno())
    theirs.close()

    def below(request: dict[str, Any]) -> dict[str, Any]:
        send(mine.fileno(), request)
        return receive(mine.fileno())

    answer("middle", reader, writer, below)


def deep(link: int) -> None:
    """Level 2."""
    answer("deep", link, link, lambda _: {"processes": []})


def main(words: list[str]) -> None:
    """Be the level that the command line names."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    level, *rest = words
    if level == "conductor":
        conduct(Path(rest[0]), rest[1], rest[2])
    elif level == "middle":
        middle(int(rest[0]), int(rest[1]), rest[2])
    else:
        deep(int(rest[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
