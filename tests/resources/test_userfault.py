"""Programs that answer page faults: what is asked of them leaves no trace, and what cannot be carried is refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from pipeline.ids import HostPid, RemoteAddress
from pipeline.kernel import procfs, smaps, userfaultfd
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import PAGE_BYTES, entries_of, intersect, open_pagemap
from pipeline.kernel.syscalls import pidfd_getfd, pidfd_open, syscall
from pipeline.kernel.uffdio import MODE
from pipeline.resources.memory import answering, tracking
from pipeline.resources.memory.answering import Answered, Answerer, Watched
from pipeline.resources.memory.capture import capture_address_space, watched_by_others
from pipeline.resources.memory.classify import WATCHED
from pipeline.resources.memory.objects import MemoryObjects
from pipeline.resources.memory.scope import CannotCarry
from pipeline.stages import freeze
from pipeline.stages.asking import inside
from tests.harness.tree import PATIENCE_S, engine, said
from tests.resources.memorytarget import Scope

PRELUDE = """
import ctypes, fcntl, mmap, os, socket, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
P = 4096

def pages(count, flags=0x22, fd=-1):
    return libc.mmap(0, count * P, 3, flags, fd, 0)

def made(features=0, flags=1, begun=True):
    fd = libc.syscall(323, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    assert fd >= 0, os.strerror(ctypes.get_errno())
    if begun:
        fcntl.ioctl(fd, 0xC018AA3F, bytearray(struct.pack("<3Q", 0xAA, features, 0)))
    return fd

def watch(fd, address, count, modes=1):
    fcntl.ioctl(fd, 0xC020AA00, bytearray(struct.pack("<4Q", address, count * P, modes, 0)))

def protect(fd, address, count):
    fcntl.ioctl(fd, 0xC018AA06, bytearray(struct.pack("<3Q", address, count * P, 1)))

def write(address):
    libc.memset(ctypes.c_void_p(address), 1, 1)

def until(name):
    while not os.path.exists(name):
        time.sleep(0.01)

def ready(*facts):
    with open("facts.new", "w") as file:
        print(*facts, file=file)
    os.rename("facts.new", "facts")
    while True:
        time.sleep(0.01)
"""


def wait_until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.002)


@contextmanager
def program(folder: Path, body: str) -> Iterator[tuple[HostPid, list[int]]]:
    """A program that runs `body` behind the prelude, and what it has said by `ready`."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", PRELUDE + body],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        wait_until("it is ready", lambda: process.poll() is not None or (folder / "facts").exists())
        if process.poll() is not None:
            said_by_it = (folder / "log").read_text()
            if "Invalid argument" in said_by_it:
                pytest.skip(f"this kernel has not what is asked for: {said_by_it.splitlines()[-1]}")
            raise AssertionError(said_by_it)
        yield HostPid(process.pid), [int(word) for word in (folder / "facts").read_text().split()]
    finally:
        with suppress(procfs.ProcessGone):
            for child in procfs.children(HostPid(process.pid)):
                os.kill(child, 9)
        process.kill()
        process.wait()


def watched(pid: HostPid) -> list[tuple[int, int, frozenset[str]]]:
    """What of its memory is watched, and what is mapped for no use, as a page is that is tried out."""
    return [
        (one.start, one.end, one.flags & WATCHED)
        for one in smaps.smaps(pid)
        if one.flags & WATCHED or not one.prot
    ]


def refused(pid: HostPid, tmp_path: Path) -> str:
    """What `dump` says, which leaves the program as it was."""
    before = watched(pid)
    done = engine("dump", "--pid", pid, "--to", tmp_path / "image")
    assert done.returncode == 3, said(done)
    assert watched(pid) == before
    return done.stderr


WHOLE = "memory = pages(4); fd = made(); watch(fd, memory, 4)\n"


def test_one_whose_answers_come_from_outside_is_refused(tmp_path: Path) -> None:
    """The descriptor is in this process only."""
    body = (
        WHOLE
        + "threading.Thread(target=lambda: (until('taken'), os.close(fd), open('closed', 'w'))).start()\nready(fd)"
    )
    with program(tmp_path, body) as (pid, (number,)), ExitStack() as stack:
        process = pidfd_open(pid)
        stack.callback(os.close, process)
        stack.callback(os.close, pidfd_getfd(process, number))
        assert "held by" in refused(pid, tmp_path)
        (tmp_path / "taken").touch()
        wait_until("closed", (tmp_path / "closed").exists)
        assert "is watched by a userfaultfd (missing pages) that no process of the tree has" in refused(
            pid, tmp_path
        )


REFUSED = {
    "answers for memory that no process of the tree has": """
here, there = socket.socketpair()
if not (child := os.fork()):
    fd = made()
    socket.send_fds(there, [b"!"], [fd])
    os.kill(os.getpid(), 9)
_, (fd,), _, _ = socket.recv_fds(here, 1, 1)
os.waitpid(child, 0)
here.close(); there.close()
ready()
""",
    "the userfaultfd is being set up": "made(begun=False)\nready()",
    "missing pages of shared memory": """
file = os.memfd_create("shared")
os.ftruncate(file, 4 * P)
watch(made(1 << 5), pages(4, 1, file), 4)
ready()
""",
    "huge pages of hugetlbfs": """
watch(made(), libc.mmap(0, 2 << 20, 3, 0x22 | 0x40000 | 0x4000, -1, 0), 512)
ready()
""",
    "of which pages are poisoned": """
memory = pages(4); fd = made(1 << 14); watch(fd, memory, 4)
fcntl.ioctl(fd, 0xC020AA08, bytearray(struct.pack("<4Q", memory + P, P, 0, 0)))
ready()
""",
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_what_cannot_be_made_again_is_refused(tmp_path: Path, reason: str) -> None:
    with program(tmp_path, REFUSED[reason]) as (pid, _):
        assert reason in refused(pid, tmp_path)


def test_a_process_that_has_another_ones_is_refused_alone(tmp_path: Path) -> None:
    """The parent's memory is not the child's, though it looks the same and is at the same addresses."""
    body = WHOLE + "child = os.fork()\nif not child:\n    while True: time.sleep(0.01)\nready(child)"
    with program(tmp_path, body) as (_, (child,)):
        assert "held by" in refused(HostPid(child), tmp_path)


@contextmanager
def looked_at(pid: HostPid, *numbers: int) -> Iterator[list[Answered | CannotCarry]]:
    """What is found of userfaultfds of a tree that stands still meanwhile."""
    with ExitStack() as stack:
        process = pidfd_open(pid)
        stack.callback(os.close, process)
        fds = [pidfd_getfd(process, number) for number in numbers]
        for fd in fds:
            stack.callback(os.close, fd)
        tree = freeze.freeze(pid, suspend_seccomp=False)
        stack.callback(freeze.release, tree)
        tasks = {one.pid: [HostPid(tid) for tid in one.tasks] for one in tree.living()}
        yield answering.look(
            [Answerer(fd, pid) for fd in fds],
            list(tasks),
            lambda one: inside(one, sorted(tasks[one], key=lambda tid: tid != one)),
            smaps.smaps,
        )


def test_whose_memory_it_is_does_not_depend_on_addresses(tmp_path: Path) -> None:
    """A child has one of its own for the same addresses, for other pages; both descriptors are the parent's."""
    body = """
memory = pages(4)
here, there = socket.socketpair()
if not (child := os.fork()):
    fd = made()
    watch(fd, memory + P, 2)
    socket.send_fds(there, [b"!"], [fd])
    os.close(fd)
    while True:
        time.sleep(0.01)
_, (theirs,), _, _ = socket.recv_fds(here, 1, 1)
fd = made()
watch(fd, memory, 2)
ready(child, fd, theirs, memory)
"""
    with program(tmp_path, body) as (pid, (child, fd, theirs, memory)):
        before = watched(pid), watched(HostPid(child))
        with looked_at(pid, fd, theirs) as found:
            mine, its = found
            assert isinstance(mine, Answered)
            assert isinstance(its, Answered)
            assert (mine.owner, its.owner) == (pid, child)
            assert mine.watched == [Watched(memory, memory + 8192, 1)]
            assert its.watched == [Watched(memory + 4096, memory + 3 * 4096, 1)]
        assert (watched(pid), watched(HostPid(child))) == before


def test_locked_memory_is_asked_as_well(tmp_path: Path) -> None:
    """Where everything new is locked, and so is there at once (MCL_FUTURE)."""
    body = WHOLE + "assert not libc.mlockall(2)\nready(fd)"
    with program(tmp_path, body) as (pid, (fd,)), looked_at(pid, fd) as (found,):
        assert isinstance(found, Answered)
        assert found.user_mode_only


@pytest.mark.root
def test_one_that_is_told_of_the_kernels_faults_is_known(tmp_path: Path) -> None:
    body = WHOLE.replace("made()", "made(flags=0)") + "ready(fd)"
    with program(tmp_path, body) as (pid, (fd,)):
        for _ in range(3):
            with looked_at(pid, fd) as (found,):
                assert isinstance(found, Answered)
                assert not found.user_mode_only
        assert procfs.fdinfo(pid, fd)["pending"] == ["0"]


@pytest.mark.root
def test_who_waits_for_a_page_in_a_system_call_is_tried_again(tmp_path: Path) -> None:
    """The page is brought by a thread that cannot bring it while the tree is being stopped."""
    body = """
memory = pages(1); fd = made(flags=0); watch(fd, memory, 1)
def read():
    zeros = os.open("/dev/zero", os.O_RDONLY)
    libc.read(zeros, ctypes.c_void_p(memory), 1)
    open("read", "w")
def bring():
    while not os.path.exists("bring"):
        time.sleep(0.01)
    fcntl.ioctl(fd, 0xC020AA04, bytearray(struct.pack("<3Qq", memory, P, 0, 0)))
threading.Thread(target=read).start()
threading.Thread(target=bring).start()
ready()
"""
    with program(tmp_path, body) as (pid, _):
        why = refused(pid, tmp_path)
        assert "waits in a system call for a page that a userfaultfd answers for" in why
        seen = threading.Thread(target=_touch_when_traced, args=(pid, tmp_path / "bring"))
        seen.start()
        done = engine("dump", "--pid", pid, "--to", tmp_path / "image", "--leave-running")
        seen.join()
        assert done.returncode == 0, said(done)
        wait_until("it has read", (tmp_path / "read").exists)


def _touch_when_traced(pid: HostPid, file: Path) -> None:
    wait_until("it is traced", lambda: procfs.status(pid).tracer_pid != 0)
    file.touch()


def test_memory_that_is_watched_meanwhile_is_known_by_who_watches(tmp_path: Path) -> None:
    """What could not be tracked is refused if nobody in the tree watches it."""
    with program(tmp_path, WHOLE + "ready(memory)") as (pid, (memory,)):
        watch = tracking.begin(pid, _nobody, answers=True)
        found = watch.collect()
        assert not found.runs
        assert any(start <= memory < end for start, end in found.unwatched)
        assert not watch.may_watch(memory, memory + 4096)
        (blocker,) = watched_by_others(pid, found.unwatched, watch.may_watch, [])
        assert "that no process of the tree has" in blocker.reason
        answered = [Answered(pid, 0, True, [Watched(memory, memory + 4 * 4096, 1)], [], [], [])]
        assert not watched_by_others(pid, found.unwatched, watch.may_watch, answered)
        watch.close()


def _nobody(*_: int) -> int:
    raise AssertionError("nothing is run in it")


#: pages that a program notes the writes to by itself; the second one was written since
NOTED = """
memory = pages(4)
for number in range(4):
    write(memory + number * P)
fd = made(1 << 13 | 1 << 15)
watch(fd, memory, 4, 2)
protect(fd, memory, 4)
write(memory + P)
"""


@contextmanager
def tracked(pid: HostPid) -> Iterator[tracking.Tracking]:
    """Its writes are tracked as in rounds, and were asked for once."""
    tree = freeze.freeze(pid, suspend_seccomp=False)
    try:
        with inside(pid, list(tree.processes[pid].tasks)) as task:
            try:
                watch = tracking.WriteProtected(pid, task.syscall)
            except OSError as error:
                pytest.skip(f"this kernel has no asynchronous write protection: {error}")
        watch.collect()
    finally:
        freeze.release(tree)
    try:
        yield watch
    finally:
        watch.close()


def do(folder: Path, name: str) -> str:
    """Let the program do what it waits for, and say something of it."""
    (folder / name).touch()
    wait_until(name, (folder / f"{name}.done").exists)
    return (folder / f"{name}.done").read_text()


def done(what: str, name: str) -> str:
    """A thread that waits for `name`, does something, and puts what `told` is into a file."""
    return (
        f"def act():\n    global told, fd\n    until({name!r})\n"
        + "".join(f"    {line}\n" for line in what.strip().splitlines())
        + f"    open('told', 'w').write(str(told))\n    os.rename('told', {name + '.done'!r})\n"
        + "threading.Thread(target=act).start()\n"
    )


def test_who_begins_to_answer_faults_is_tracked_no_longer(tmp_path: Path) -> None:
    body = done("fd = told = made()", "begin") + "ready()"
    with program(tmp_path, body) as (pid, _), tracked(pid) as watch:
        watch.collect()
        do(tmp_path, "begin")
        with pytest.raises(tracking.TrackingLost, match="has begun to answer page faults itself"):
            watch.collect()


def test_marks_of_a_program_that_tracks_itself_are_left_alone(tmp_path: Path) -> None:
    """The descriptor is elsewhere, so that nothing but the kernel's refusal tells of it."""
    body = done(NOTED + "told = f'{memory} {fd}'", "note") + done("told = os.close(fd)", "give") + "ready()"
    with program(tmp_path, body) as (pid, _), ExitStack() as stack:
        watch = stack.enter_context(tracked(pid))
        memory, number = map(int, do(tmp_path, "note").split())
        process = pidfd_open(pid)
        stack.callback(os.close, process)
        stack.callback(os.close, pidfd_getfd(process, number))
        do(tmp_path, "give")
        assert intersect(watch.collect().unwatched, [(memory, memory + 4 * PAGE_BYTES)])
        assert marks(pid, memory) == [True, False, True, True]


def marks(pid: HostPid, memory: int) -> list[bool]:
    """Which of four pages are write-protected."""
    pagemap = open_pagemap(pid)
    try:
        ((_, entries),) = entries_of(pagemap, memory, memory + 4 * PAGE_BYTES)
    finally:
        os.close(pagemap)
    return [bool(top & 0x02) for top in entries[7::8]]


def test_what_a_program_protects_does_not_count_as_untouched(tmp_path: Path) -> None:
    """If it were our own protection, it would: pages that were not written since they were sent."""
    with program(tmp_path, NOTED + "ready(memory)") as (pid, (memory,)):
        whole = [(memory, memory + 4 * PAGE_BYTES)]
        answered = [Answered(pid, 0, True, [Watched(*whole[0], MODE.WP)], [], [], [])]
        with Scope() as scope, MemoryObjects(scope) as objects:
            look = partial(capture_address_space, pid, objects, brk=RemoteAddress(0), tracked=True)
            assert intersect(look().untouched, whole)
            assert not intersect(look(answered=answered).untouched, whole)
            assert intersect(look(answered=answered).runs, whole) == whole


def test_missing_pages_that_may_be_swapped_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that is protected and missing looks as one that is swapped out."""
    body = "memory = pages(4); fd = made(1 << 13); watch(fd, memory, 4, 3); protect(fd, memory, 2); ready(fd)"
    with program(tmp_path, body) as (pid, (fd,)):
        with looked_at(pid, fd) as (found,):
            assert isinstance(found, Answered)
            assert found.bare == found.protected
        monkeypatch.setattr(smaps, "swapped_bytes", lambda _: PAGE_BYTES)
        with looked_at(pid, fd) as (found,):
            assert isinstance(found, CannotCarry)
            assert "may be missing or swapped out" in found.reason


def test_its_memory_goes_when_it_stands_still(tmp_path: Path) -> None:
    """It is not tracked, and that is said; nothing but what it has itself watches it meanwhile."""
    with program(tmp_path, "fd = made(); ready()") as (pid, _):
        done = engine(
            "dump", "--mode", "precopy", "--pid", pid, "--to", tmp_path / "image", "--leave-running"
        )
        assert done.returncode == 0, said(done)
        assert f"pid {pid} answers page faults by userfaultfd itself" in done.stdout + done.stderr


def test_features_are_known_when_they_were_chosen() -> None:
    assert answering.features_of({"API": ["aa:80000100:7ffff"]}) == 0x100
    assert answering.features_of({"API": ["aa:0:7ffff"]}) is None


@pytest.mark.parametrize("may_be_named", [True, False])
def test_who_has_one_is_known(monkeypatch: pytest.MonkeyPatch, may_be_named: bool) -> None:
    """By what is said of it, where the process runs with another id."""

    def refused(path: str) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    me = HostPid(os.getpid())
    if not may_be_named:
        monkeypatch.setattr(os, "readlink", refused)
    assert not userfaultfd.has_one(me)
    fd = syscall(NR.userfaultfd, userfaultfd.MAKE_FLAGS)
    try:
        assert userfaultfd.has_one(me)
    finally:
        os.close(fd)
    assert not userfaultfd.has_one(me)
