"""Address spaces made again in real puppets are the ones that were captured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, RemoteAddress, RemoteFd
from pipeline.image.schema import AddressSpace, Vma
from pipeline.kernel.pagemap import Range, intersect, subtract
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet, spawn_launcher
from pipeline.resources.memory import rebuild, sharing
from pipeline.resources.memory.alike import ordinary
from pipeline.resources.memory.capture import Captured, capture_address_space
from pipeline.resources.memory.objects import MemoryObjects
from pipeline.resources.memory.pages import read_runs
from pipeline.stages.memory_layout import HOLE_BYTES, empty, set_bounds
from tests.resources.memorytarget import Scope, program, rests_in

PAGE = 4096


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


@contextmanager
def launched(*spaces: AddressSpace) -> Iterator[Puppet]:
    hole = rebuild.find_hole([space.vmas for space in spaces], HOLE_BYTES)
    launcher = spawn_launcher(hole, 900)
    try:
        yield launcher
    finally:
        launcher.kill_and_reap()
        launcher.stage.channel.close()
        assert not any(kind == "puppet" for kind, _ in LEDGER.held())


class Sources:
    """Opens what mappings need, from the captured objects themselves, and gives it to a puppet."""

    def __init__(self, objects: MemoryObjects) -> None:
        self._objects = objects

    def _open(self, source: rebuild.Source) -> int:
        if source.kind == "file":
            file = self._objects.mapped_files[source.number]
            return os.open(file.path.path, os.O_RDWR if file.writable else os.O_RDONLY)
        (shared,) = [o for o in self._objects.shared_memory if o.record.space == source.number]
        return os.open(f"/proc/self/fd/{shared.fd}", os.O_RDONLY if source.read_only else os.O_RDWR)

    def give(self, puppet: Puppet, wanted: list[rebuild.Source]) -> dict[rebuild.Source, RemoteFd]:
        fds = [self._open(source) for source in wanted]
        try:
            return {s: RemoteFd(fd) for s, fd in zip(wanted, puppet.send_fds(fds), strict=True)}
        finally:
            for fd in fds:
                os.close(fd)


def fill(pid: HostPid, runs: list[Range], puppet: Puppet) -> None:
    buffer = bytearray(1 << 20)
    for segments, _ in read_runs(pid, runs, buffer):
        at = 0
        for address, length in segments:
            assert os.pwrite(puppet.memory, memoryview(buffer)[at : at + length], address) == length
            at += length


def recaptured(puppet: Puppet, objects: MemoryObjects) -> list[Vma]:
    found = capture_address_space(puppet.pid, objects, brk=RemoteAddress(0))
    scratch = puppet.stage.scratch
    return canonical([vma for vma in found.space.vmas if not vma.start <= scratch < vma.end])


def canonical(vmas: list[Vma]) -> list[Vma]:
    """Neighbours that the kernel may or may not merge, merged."""
    found: list[Vma] = []
    for vma in ordinary(vmas):
        if found and found[-1].end == vma.start:
            last = found[-1]
            offset = last.offset + vma.start - last.start if last.backing is not None else 0
            if msgspec.structs.replace(vma, start=last.start, offset=last.offset, guards=last.guards) == (
                msgspec.structs.replace(last, end=vma.end)
            ) and (vma.offset == offset):
                found[-1] = msgspec.structs.replace(last, end=vma.end, guards=[*last.guards, *vma.guards])
                continue
        found.append(vma)
    return found


def contents(pid: HostPid, runs: list[Range]) -> bytes:
    buffer = bytearray(1 << 20)
    return b"".join(bytes(buffer[:n]) for _, n in read_runs(pid, runs, buffer))


MAPPINGS = """
anon = mmap(9); write(anon, b"anon" * P); mprotect(anon + P, 2, R); mprotect(anon + 4 * P, 1, 0)
down = mmap(8, flags=PRIVATE | ANON | GROWSDOWN | NORESERVE); write(down + 7 * P, b"d")
advised = mmap(2)
for advice in (1, 10, 12, 16, 18): madvise(advised, 2, advice)
huge = mmap(1024); madvise(huge, 1024, 14); write(huge + 600 * P, b"huge")
locked = mmap(6); madvise(locked + P, 1, 102); call(149, locked + 3 * P, 3 * P)
try: call(149, locked, 3 * P)
except OSError: pass
none = mmap(3, prot=0)
try: call(149, none, 3 * P)
except OSError: pass
onfault = mmap(2); call(325, onfault, 2 * P, 1)
guarded = mmap(8); write(guarded, b"g" * 8 * P); madvise(guarded + 2 * P, 2, 102)
sealed = mmap(2); write(sealed, b"sealed"); mprotect(sealed, 2, R); call(462, sealed, 2 * P, 0)
shared = mmap(8, flags=SHARED | ANON); write(shared + 3 * P, b"hello")
call(11, shared, 2 * P)
memfd = os.memfd_create("m"); os.ftruncate(memfd, 5 * P)
mapped = mmap(4, flags=SHARED, fd=memfd, offset=P)
ro = os.open("/proc/self/fd/%d" % memfd, os.O_RDONLY)
mapped_ro = mmap(2, prot=R, flags=SHARED, fd=ro)
copied = mmap(2, flags=PRIVATE, fd=memfd); write(copied, b"own")
path = sys.argv[1] + "/file"
fd = os.open(path, os.O_RDWR | os.O_CREAT); os.write(fd, b"f" * 4 * P)
private = mmap(4, flags=PRIVATE, fd=fd); write(private + P, b"changed"); mprotect(private, 4, R)
file_shared = mmap(2, flags=SHARED, fd=fd, offset=2 * P)
try:
    droppable = mmap(2, flags=8 | ANON)
except OSError:
    pass
"""


@pytest.mark.root
def test_every_mapping_is_made_again(folder: str) -> None:
    with (
        program(MAPPINGS + "ready()", folder) as target,
        Scope() as scope,
        MemoryObjects(scope) as objects,
    ):
        found = capture_address_space(target.pid, objects, brk=RemoteAddress(0))
        assert found.blockers == []
        brk = max(vma.end for vma in found.space.vmas if vma.start == found.space.layout[4])
        space = msgspec.structs.replace(
            found.space, layout=[*found.space.layout[:5], brk, *found.space.layout[6:]]
        )
        with launched(space) as puppet:
            puppet.exec_puppet()
            fds = Sources(objects).give(puppet, rebuild.sources(space.vmas))
            empty(puppet, space)
            set_bounds(puppet, space, -1)
            puppet.run_checked(rebuild.create(space, fds, {}))
            fill(target.pid, found.runs, puppet)
            puppet.run_checked(rebuild.complete(space))
            again = capture_address_space(puppet.pid, objects, brk=RemoteAddress(0))
            assert recaptured(puppet, objects) == canonical(found.space.vmas)
            assert again.space.layout[6:] == space.layout[6:]
            kernels = {vma.kind: vma.start for vma in space.vmas if vma not in ordinary(space.vmas)}
            assert {
                v.kind: v.start for v in again.space.vmas if v not in ordinary(again.space.vmas)
            } == kernels
            assert contents(puppet.pid, found.runs) == contents(target.pid, found.runs)


FORKED = (
    MAPPINGS
    + """
import time
gone = mmap(5); write(gone, b"gone")
grows = mmap(30); write(grows, b"G" * 30 * P)
big = mmap(600); write(big, b"B" * 600 * P)
child = os.fork()
if child == 0:
    call(11, gone, 5 * P)
    call(11, grows + 20 * P, 10 * P)
    mprotect(grows, 4, R)
    replaced = mmap(2, flags=SHARED | ANON | 0x10, at=grows + 6 * P); write(replaced, b"R")
    madvise(big + 100 * P, 50, 4)
    write(big + 300 * P, b"child")
    new = mmap(3); write(new, b"new")
    madvise(big, 10, 16)
    x = [bytearray(5000) for _ in range(2000)]
    time.sleep(1000)
call(11, grows, P)
write(big + 400 * P, b"parent")
y = [bytearray(5000) for _ in range(1000)]
ready(child=child, big=big)
"""
)


@pytest.mark.root
def test_a_forked_puppet_becomes_the_child(folder: str) -> None:
    with program(FORKED, folder) as target, Scope() as scope, MemoryObjects(scope) as objects:
        child = HostPid(target["child"])
        try:
            rests_in(child, "nanosleep")
            parents = capture_address_space(target.pid, objects, brk=RemoteAddress(0))
            childs = capture_address_space(child, objects, brk=RemoteAddress(0))
            assert parents.blockers == childs.blockers == []
            grow_and_compare(target.pid, parents, child, childs, objects)
        finally:
            os.kill(child, 9)


def grow_and_compare(
    parent_pid: HostPid, parents: Captured, child_pid: HostPid, childs: Captured, objects: MemoryObjects
) -> None:
    plan = sharing.plan_copy_on_write(
        parent_pid, parents.space, parents.runs, child_pid, childs.space, childs.runs
    )
    space = msgspec.structs.replace(childs.space, dropped=plan.dropped)
    with launched(parents.space, space) as puppet:
        puppet.exec_puppet()
        fds = Sources(objects).give(puppet, rebuild.sources(parents.space.vmas))
        empty(puppet, parents.space)
        puppet.run_checked(rebuild.create(parents.space, fds, {}))
        fill(parent_pid, parents.runs, puppet)
        twin = puppet.clone_task(CLONE.PARENT)
        try:
            wanted = rebuild.missing(parents.space, space)
            assert set(wanted) < set(rebuild.sources(space.vmas))
            twin.run_checked(rebuild.inherit(parents.space, space, Sources(objects).give(twin, wanted), {}))
            fill(child_pid, plan.send, twin)
            twin.run_checked(rebuild.complete(space))
            puppet.run_checked(rebuild.complete(parents.space))
            assert recaptured(puppet, objects) == canonical(parents.space.vmas)
            assert recaptured(twin, objects) == canonical(childs.space.vmas)
            assert contents(twin.pid, childs.runs) == contents(child_pid, childs.runs)
            assert contents(puppet.pid, parents.runs) == contents(parent_pid, parents.runs)
            again = capture_address_space(twin.pid, objects, brk=RemoteAddress(0))
            assert intersect(again.runs, plan.dropped) == []
            still = sharing.plan_copy_on_write(
                puppet.pid, parents.space, parents.runs, twin.pid, space, childs.runs
            )
            locked = [(v.start, v.end) for v in parents.space.vmas if v.locked]
            assert subtract(still.shared, locked) == subtract(plan.shared, locked), "one page in memory again"
        finally:
            twin.kill_and_reap()


def vma(start: int, end: int, **more: int) -> Vma:
    return Vma(start=start * PAGE, end=end * PAGE, kind="anon", prot=3, flags=2, **more)  # type: ignore[arg-type]


def test_a_hole_is_free_in_every_layout() -> None:
    top = 0x7FFF_FFFF_F000 // PAGE
    one, other = [vma(0x100, 0x40000), vma(0x90000, top)], [vma(0x40000, 0x41000), vma(0x80000, 0x81000)]
    hole = rebuild.find_hole([one, other], 1 << 20)
    assert hole > 0x41000 * PAGE
    assert hole + (1 << 20) < 0x80000 * PAGE
    with pytest.raises(RebuildError, match="address space"):
        rebuild.find_hole([[vma(0x100, 0x41000)], [vma(0x41000, top)]], 1 << 20)


def test_a_missing_descriptor_is_named() -> None:
    space = AddressSpace(
        space=1,
        vmas=[Vma(start=PAGE, end=2 * PAGE, kind="file", prot=1, flags=2, backing=4)],
        exe=0,
        layout=[0] * 11,
        auxv=b"",
    )
    with pytest.raises(RebuildError, match="no descriptor of file 4"):
        rebuild.create(space, {}, {})
