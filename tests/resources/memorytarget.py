"""Real programs with every kind of mapping, for the tests of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from pipeline.ids import HostPid
from pipeline.image.schema import Id, PathRef
from pipeline.resources.memory.scope import CannotCarry

PRELUDE = r"""
import ctypes, errno, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.syscall.restype = ctypes.c_long
P = 4096
R, W, X = 1, 2, 4
SHARED, PRIVATE, ANON, NORESERVE, GROWSDOWN = 1, 2, 0x20, 0x4000, 0x100

def check(result):
    if result in (-1, None, 2**64 - 1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result

def mmap(pages, prot=R | W, flags=PRIVATE | ANON, fd=-1, offset=0, at=0):
    return check(libc.mmap(at, pages * P, prot, flags, fd, offset))

def call(number, *args):
    return check(libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *args)]))

def madvise(address, pages, advice):
    call(28, address, pages * P, advice)

def mprotect(address, pages, prot):
    call(10, address, pages * P, prot)

def write(address, content):
    ctypes.memmove(address, content, len(content))

def ready(**facts):
    print(json.dumps(facts), flush=True)
    sys.stdin.read()
    os._exit(0)
"""


class Program:
    """A running program and what it said about itself."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.pid = HostPid(process.pid)
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("the target failed, see its stderr")
        self.facts: dict[str, Any] = json.loads(line)
        rests_in(self.pid, "pipe_read")  # what it has written into is as it will stay

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]


def rests_in(pid: HostPid, function: str) -> None:
    """Return when a process sleeps in a kernel function of such a name (proc_pid_wchan(5))."""
    while True:
        with open(f"/proc/{pid}/wchan") as wchan:
            if function in wchan.read():
                return
        time.sleep(0.001)


@contextmanager
def program(body: str, *args: str, python: str = sys.executable) -> Iterator[Program]:
    """Run `body` behind the prelude until it calls ready(name=value, ...); gone at the end."""
    process = subprocess.Popen(
        [python, "-c", PRELUDE + body, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        yield Program(process)
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()


class Scope:
    """A real `MemoryScope` of one process tree outside of any namespace; closes what it kept."""

    def __init__(self) -> None:
        self.spaces: dict[Hashable, int] = {}
        self.files: dict[Hashable, int] = {}
        self.contents: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        while self.contents:
            os.close(self.contents.popitem()[1])

    def space_of(self, key: Hashable) -> int:
        return self.spaces.setdefault(key, len(self.spaces) + 1)

    def file_of(self, key: Hashable) -> int:
        return self.files.setdefault(key, len(self.files))

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        return PathRef(0, link)

    def segment(self, pid: HostPid, identifier: int) -> int:
        raise CannotCarry("is a System V shared memory segment of outside")

    def take_along(self, pid: HostPid, name: bytes, fd: int) -> None:
        """Nothing is asked for here: see `tests/test_with_files.py`."""

    def user(self, uid: int) -> Id:
        return Id(0, uid)

    def group(self, gid: int) -> Id:
        return Id(0, gid)

    def content(self, local: int, size_bytes: int) -> int:
        space = self.space_of(("content", local))
        self.contents[space] = os.dup(local)
        return space
