"""Rings of asynchronous I/O: what is refused, what is waited for, and what a child of fork(2) has of them."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from pipeline.errors import Blocker, ImageError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import AddressSpace, AioRing, Vma
from pipeline.kernel import smaps
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.kinds import FdView
from pipeline.resources.memory import aio
from pipeline.resources.memory.capture import capture_address_space
from pipeline.resources.memory.objects import MemoryObjects
from pipeline.resources.memory.scope import CannotCarry
from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, Workshop, dump, engine, family_of, reap, restore, said
from tests.resources.memorytarget import Scope

_REQUEST = struct.Struct("<Q2IHhI2QqQ2I")
_PREAD, _POLL = 0, 5
_POLLIN = 1


class Context:
    """A context of this process, and a request that its events lead to."""

    def __init__(self) -> None:
        made = ctypes.create_string_buffer(8)
        syscall(NR.io_setup, 8, made)
        self.at = int.from_bytes(made.raw, "little")
        self._requests: list[ctypes.Array[ctypes.c_char]] = []

    def submit(self, opcode: int, fd: int, events: int = 0) -> None:
        request = _REQUEST.pack(1, 0, 0, opcode, 0, fd, events, 0, 0, 0, 0, 0)
        self._requests.append(ctypes.create_string_buffer(request))
        pointer = ctypes.addressof(self._requests[-1]).to_bytes(8, "little")
        assert syscall(NR.io_submit, self.at, 1, pointer) == 1

    def captured(self) -> AioRing:
        pid = HostPid(os.getpid())
        return aio.capture(pid, next(m for m in smaps.smaps(pid) if m.start == self.at))


@pytest.fixture
def empty() -> Iterator[int]:
    fd = os.memfd_create("empty")
    yield fd
    os.close(fd)


@contextmanager
def context() -> Iterator[Context]:
    made = Context()
    try:
        yield made
    finally:
        syscall(NR.io_destroy, made.at)


def settled(ring: AioRing, *views: FdView) -> tuple[AioRing, list[Blocker]]:
    rings, blockers = aio.settle({7: (HostPid(os.getpid()), [ring])}, views)
    return rings[7][0], blockers


def test_an_event_that_arrives_while_the_program_stands_still_is_taken_along(empty: int) -> None:
    with context() as made:
        made.submit(_PREAD, empty)
        before = made.captured()
        assert settled(before) == (before, [])
        made.submit(_PREAD, empty)
        assert settled(before) == (made.captured(), [])
        assert made.captured().tail == before.tail + 1


def test_events_that_never_cease_are_waited_for(monkeypatch: pytest.MonkeyPatch, empty: int) -> None:
    monkeypatch.setattr(aio, "SETTLE_S", 0.2)
    with context() as made:
        quiet = time.sleep

        def sleep(seconds: float) -> None:
            made.submit(_PREAD, empty)
            quiet(seconds)

        monkeypatch.setattr(time, "sleep", sleep)
        _, (blocker,) = settled(made.captured())
        assert blocker.transient
        assert "in flight" in blocker.reason


def test_a_poll_that_ends_while_the_program_stands_still_is_refused() -> None:
    event = os.eventfd(0)
    try:
        with context() as made:
            made.submit(_POLL, event, _POLLIN)
            before = made.captured()
            os.eventfd_write(event, 1)
            _, (blocker,) = settled(before)
            assert "IOCB_CMD_POLL" in blocker.reason
            assert not blocker.transient
    finally:
        os.close(event)


def test_disks_of_files_that_are_read_directly_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(aio, "_await_idle", asked.append)
    (tmp_path / "file").touch()
    fd = LocalFd(os.open(tmp_path / "file", os.O_RDONLY))
    try:
        with context() as made:
            for flags in (os.O_DIRECT, 0):
                view = FdView(HostPid(os.getpid()), fd, fd, b"", os.fstat(fd), {}, flags, 0)
                assert settled(made.captured(), view) == (made.captured(), [])
                assert aio.settle({}, [view]) == ({}, [])
    finally:
        os.close(fd)
    assert asked == [(tmp_path / "file").stat().st_dev]


def test_a_disk_is_waited_for_only_for_a_while() -> None:
    for name in ("0:999", *os.listdir("/sys/dev/block")[:3]):
        begun = time.monotonic()
        aio._await_idle(os.makedev(*map(int, name.split(":"))))
        assert time.monotonic() - begun < aio.BUSY_S + 1


def test_a_ring_in_which_a_poll_ended_is_refused() -> None:
    ready = os.eventfd(1)
    try:
        with context() as made:
            assert made.captured().tail == 0
            made.submit(_POLL, ready, _POLLIN)
            with pytest.raises(CannotCarry, match="IOCB_CMD_POLL"):
                made.captured()
    finally:
        os.close(ready)


def test_a_part_of_a_ring_is_refused() -> None:
    with context() as made:
        mapping = next(m for m in smaps.smaps(HostPid(os.getpid())) if m.start == made.at)
        with pytest.raises(CannotCarry, match="a part"):
            aio.capture(HostPid(os.getpid()), mapping._replace(offset=4096))


def test_what_is_left_of_a_context_is_memory() -> None:
    with context() as made, Scope() as scope, MemoryObjects(scope) as objects:
        for contexts, kind in ((None, "aio"), ({made.at}, "aio"), (set[int](), "shared")):
            found = capture_address_space(HostPid(os.getpid()), objects, brk=0, contexts=contexts)  # type: ignore[arg-type]
            assert next(vma.kind for vma in found.space.vmas if vma.start == made.at) == kind
            assert [ring.start for ring in found.space.rings] == ([made.at] if kind == "aio" else [])


RING = AioRing(0x10000, 1, 120, 2, bytes(32 * 9))


@pytest.mark.parametrize(
    "ring",
    [
        msgspec.structs.replace(RING, start=0x20000),
        msgspec.structs.replace(RING, pages=2),
        msgspec.structs.replace(RING, head=127),
        msgspec.structs.replace(RING, tail=1 << 20),
        msgspec.structs.replace(RING, events=bytes(32 * 8)),
    ],
)
def test_a_ring_of_a_bad_image_is_named(ring: AioRing) -> None:
    vma = Vma(0x10000, 0x11000, "aio", 3, 1)
    space = AddressSpace(space=1, vmas=[vma], exe=0, layout=[0] * 11, auxv=b"", rings=[RING])
    aio.check(space)
    with pytest.raises(ImageError, match="ring"):
        aio.check(msgspec.structs.replace(space, rings=[ring]))


@pytest.mark.root
def test_a_child_keeps_what_it_sees_of_a_ring(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("rings", DEPTH_1, arguments=["forked"])
    dump(tree, tmp_path / "image")
    restore(tree, tmp_path / "image")
    tree.check()
    assert tree.end() == 0


@pytest.mark.root
def test_fio_goes_on_with_sixteen_requests_in_flight(workshop: Workshop, tmp_path: Path) -> None:
    """Two jobs write and read past the page cache, and verify what they read."""
    if shutil.which("fio") is None:
        pytest.skip("needs fio (Debian: apt-get install fio)")
    place = workshop.directory()
    command = ["unshare", "--ipc", "fio", "--name=job", f"--directory={place}", "--size=2m", "--numjobs=2"]
    command += ["--ioengine=libaio", "--direct=1", "--iodepth=16", "--rw=randrw", "--verify=crc32c"]
    command += [
        "--verify_backlog=32",
        "--time_based",
        "--runtime=60",
        "--rate_iops=900",
        f"--output={place}/out",
    ]
    with open(os.devnull, "r+b") as null:
        first = subprocess.Popen(
            command, cwd=place, stdin=null, stdout=null, stderr=null, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 20
        while sum("[aio]" in Path(f"/proc/{pid}/maps").read_text() for pid in family_of(first.pid)) < 2:
            assert time.monotonic() < deadline, "no rings were made"
            time.sleep(0.05)
        family = family_of(first.pid)
        done = engine("dump", "--pid", first.pid, "--to", tmp_path / "image")
        assert done.returncode == 0, said(done)
        first.poll()
        assert not reap(family)
        done = engine("restore", "--from", tmp_path / "image", "--detach")
        assert done.returncode == 0, said(done)
        time.sleep(0.5)
        os.kill(first.pid, signal.SIGINT)
    except BaseException:
        for pid in family_of(first.pid):
            os.kill(pid, signal.SIGKILL)
        raise
    finally:
        first.poll()
        assert not reap(family_of(first.pid), 30)
    output = (place / "out").read_text()
    assert output.count("err= 0") == 2, output
