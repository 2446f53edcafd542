"""The books of the pager, by events that the kernel tells late, and whose memory is not left behind."""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import pytest
import trio
import trio.testing

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.frames import PageRun
from pipeline.kernel import paging, smaps, uffdio
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.kernel.paging import Dropped, Event, Forked, Moved
from pipeline.kernel.syscalls import pidfd_getfd, pidfd_open
from pipeline.ledger import LEDGER
from pipeline.remote.guard import Guard
from pipeline.resources.memory.missing import Missing, Place
from pipeline.resources.memory.watch import ENTRY
from pipeline.stages.borrowing import Borrowing
from pipeline.stages.lending import _holds_robust_mutexes
from pipeline.stages.pager import Pager, Watched, _Memory
from pipeline.transport.tcp import Channel
from tests.harness.tree import PATIENCE_S

#: nobody has anything mapped there
AT, TO = 0x2000_0000_0000, 0x2100_0000_0000
PAGES = 4
SIZE = PAGES * PAGE_BYTES
MREMAP_MAYMOVE_FIXED = 1 | 2
MAP_FIXED_NOREPLACE = 0x100000


class _NoGuard:
    lives = True

    def hold(self, _: Iterable[int]) -> None:
        """Nothing is watched."""

    watch_over = let_go = hold

    def dismiss(self) -> None:
        """Nobody was."""

    alarm = dismiss


def _missing_after(pause_s: float, unmapped: bool) -> bool:
    """Whether pages are missing where they were moved to, when news come that what was there is no more."""

    async def main() -> bool:
        pager = Pager([], [], cast(Guard, _NoGuard()))
        memory = _Memory(1, LocalFd(-1), Missing([(0, 0x4000)]))
        pager._take_in(memory, Moved(0, 0x8000, 0x4000))
        await trio.sleep(pause_s)
        pager._take_in(memory, Dropped(0x8000, 0xC000, unmapped))
        return bool(memory.missing)

    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("pause_s", "unmapped", "missing"), [(0.0, True, True), (1.0, True, False), (0.0, False, False)]
)
def test_news_of_an_unmapping_may_be_older_than_a_move(pause_s: float, unmapped: bool, missing: bool) -> None:
    assert _missing_after(pause_s, unmapped) == missing


@pytest.mark.parametrize("fork", ["told first", "told last", "told in calm"])
def test_a_child_may_be_forked_before_or_behind_a_move_that_is_told_with_it(fork: str) -> None:
    """Of two missing pages the first is moved."""
    moved = Moved(AT, TO, PAGE_BYTES)

    async def main() -> tuple[Missing, Missing]:
        pager = Pager([], [], cast(Guard, _NoGuard()))
        memory = _Memory(1, LocalFd(-1), Missing([(AT, AT + 2 * PAGE_BYTES)]))
        events: list[Event] = [Forked(LocalFd(os.open("/dev/null", os.O_RDONLY)))]
        events.insert(fork == "told first", moved)
        for event in events:
            pager._take_in(memory, event)
            if fork == "told in calm":
                await trio.sleep(1)
        (child,) = pager._memories
        pager.give_up()
        return memory.missing, child.missing

    parent, child = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    whole = AT, AT + 2 * PAGE_BYTES
    moved_only = [
        Place(AT + PAGE_BYTES, AT + 2 * PAGE_BYTES, AT + PAGE_BYTES),
        Place(TO, TO + PAGE_BYTES, AT),
    ]
    both = [Place(*whole, AT), moved_only[1]]
    assert sorted(parent.places(*whole)) == moved_only
    assert sorted(child.places(*whole)) == (moved_only if fork == "told in calm" else both)


@pytest.mark.parametrize(
    ("first", "pending", "holds"),
    [(0, 0, False), (64, 0, True), (0, 64, True)],
    ids=["none", "one", "pending"],
)
def test_robust_mutexes_are_seen(first: int, pending: int, holds: bool) -> None:
    """`first`: where the list begins, from its head on."""
    head = (ctypes.c_uint64 * 3)()
    address = ctypes.addressof(head)
    head[0], head[2] = address + first, pending
    assert _holds_robust_mutexes(HostPid(os.getpid()), address) == holds


class Subject:
    """A child with `PAGES` pages of memory at `AT`, all of them missing; what it is told to do, a thread does."""

    def __init__(self) -> None:
        self._ask, theirs = os.pipe()
        mine, self._tell = os.pipe()
        self.pid = HostPid(os.fork())
        if self.pid == 0:
            try:
                self._obey(mine, theirs)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(mine)
        number = int(self._answers()[0])
        process = pidfd_open(self.pid)
        self.fd = pidfd_getfd(process, number)
        os.close(process)
        os.write(self._tell, b"\n")
        LEDGER.take(ENTRY, self.fd)
        paging.begin(self.fd)
        paging.register(self.fd, AT, AT + SIZE)

    def _obey(self, mine: int, theirs: int) -> None:
        for name in os.listdir("/proc/self/fd"):
            # what watches others, too
            if int(name) > 2 and int(name) not in (mine, theirs):
                with suppress(OSError):
                    os.close(int(name))
        libc = ctypes.CDLL(None, use_errno=True)
        for function in (libc.mmap, libc.mremap):
            function.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        assert libc.mmap(AT, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == AT
        device = paging.open_device()
        mine_too = paging.make(device)
        os.write(theirs, b"%d\n" % mine_too)
        os.read(mine, 1)
        os.close(mine_too)

        def look(address: int) -> str:
            out, into = os.pipe()
            if libc.write(into, address, 1) == 1:
                return f"byte {os.read(out, 1)[0]}"
            return errno.errorcode[ctypes.get_errno()]

        acts: dict[str, Callable[[], object]] = {
            "look": lambda: look(AT),
            "look there": lambda: look(TO),
            "move": lambda: libc.mremap(AT, SIZE, SIZE, MREMAP_MAYMOVE_FIXED, TO) == TO,
            "drop": lambda: libc.madvise(AT, SIZE, mmap.MADV_DONTNEED) == 0,
        }

        def act(name: str) -> None:
            os.write(theirs, f"{name}: {acts[name]()}\n".encode())

        while told := os.read(mine, 1000).decode():
            for name in told.splitlines():
                threading.Thread(target=act, args=[name], daemon=True).start()

    def begin(self, name: str) -> None:
        os.write(self._tell, f"{name}\n".encode())

    def _answers(self) -> list[str]:
        return os.read(self._ask, 1000).decode().splitlines()

    async def answers(self, *expected: str) -> None:
        """What it has said, in any order."""
        found: list[str] = []
        while len(found) < len(expected):
            await trio.lowlevel.wait_readable(self._ask)
            found += self._answers()
        assert sorted(found) == sorted(expected)

    def has_mapped(self, address: int) -> bool:
        with open(f"/proc/{self.pid}/maps") as file:
            return any(line.startswith(f"{address:x}-") for line in file)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        self.end()
        os.waitpid(self.pid, 0)
        os.close(self._tell)
        os.close(self._ask)


@pytest.fixture
def subject() -> Iterator[Subject]:
    subject = Subject()
    try:
        yield subject
    finally:
        subject.close()


def page(number: int, space: int = 1) -> PageRun:
    content = memoryview(bytearray([number + 1]) * PAGE_BYTES)
    return PageRun(space, ((AT + number * PAGE_BYTES, PAGE_BYTES),), content)


def watched(subject: Subject, space: int) -> Watched:
    return Watched(subject.pid, space, subject.fd, [(AT, AT + SIZE)])


def paged(subject: Subject, scenario: Callable[[Pager], Awaitable[None]]) -> None:
    """Play a scenario, then bring all pages."""

    async def main() -> None:
        pager = Pager([watched(subject, 1)], [], cast(Guard, _NoGuard()))
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pager.run)
                await scenario(pager)
                for number in range(PAGES):
                    await pager.bring(page(number))
                await pager.whole.wait()

    trio.run(main)


@contextmanager
def moved_while_a_page_comes(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first page meets a move: it is told what whoever has waited for the end of one is told."""
    copy = uffdio.copy

    def meet(fd: LocalFd, address: int, content: memoryview) -> int:
        patched.undo()
        subject.begin("move")
        deadline = time.monotonic() + PATIENCE_S
        while not subject.has_mapped(TO) or subject.has_mapped(AT):
            assert time.monotonic() < deadline
        raise OSError(errno.ENOENT, "nothing is mapped there")

    with monkeypatch.context() as patched:
        patched.setattr(uffdio, "copy", meet)
        yield
    assert uffdio.copy is copy


@pytest.mark.root
def test_a_page_that_comes_while_its_mapping_is_moved_is_not_lost(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(pager: Pager) -> None:
        with moved_while_a_page_comes(subject, monkeypatch):
            await pager.bring(page(0))
        await subject.answers("move: True")
        subject.begin("look there")
        await subject.answers("look there: byte 1")

    paged(subject, scenario)


@pytest.mark.root
@pytest.mark.parametrize(("act", "found"), [("drop", "byte 0"), ("move", "EFAULT")])
def test_who_waits_for_what_is_no_more_waits_no_longer(subject: Subject, act: str, found: str) -> None:
    async def scenario(pager: Pager) -> None:
        subject.begin("look")
        while not pager.requests:
            await trio.sleep(0.01)
        subject.begin(act)
        await subject.answers(f"{act}: True", f"look: {found}")

    paged(subject, scenario)


@pytest.mark.root
def test_a_page_that_comes_while_the_tree_is_given_up_makes_nothing_whole(subject: Subject) -> None:
    """Whoever brings it was in the middle of that, and hears that it is cancelled a step later."""
    begun, ended = threading.Event(), threading.Event()

    class Slow(_NoGuard):
        def alarm(self) -> None:
            begun.set()
            alarmed.append(ended.wait(PATIENCE_S))

    async def main() -> Pager:
        pager = Pager([watched(subject, 1)], [], cast(Guard, Slow()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pager.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                while not begun.is_set():
                    await trio.sleep(0.001)
                for number in range(PAGES):
                    await pager.bring(page(number))
            ended.set()
        return pager

    alarmed: list[bool] = []
    pager = trio.run(main)
    assert alarmed == [True]
    assert not pager.whole.is_set()


@pytest.mark.root
def test_who_cannot_go_on_says_so_to_whoever_sends_pages(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for ever to hear that all are there."""

    def fail(_: LocalFd) -> list[Event]:
        raise OSError(errno.EIO, "it cannot be read")

    class Silent:
        """A source that has sent all it has."""

        peer = "somebody"

        def __init__(self) -> None:
            self.reader = self

        async def next(self) -> None:
            await trio.sleep_forever()

    async def main() -> None:
        borrowing = Borrowing()
        borrowing.prepare([watched(subject, 1)], [subject.pid])
        borrowing.begin()
        failed: list[OSError] = []

        async def run() -> None:
            try:
                await borrowing.run()
            except OSError as error:
                failed.append(error)

        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run)
                subject.begin("move")
                with pytest.raises(RebuildError, match="the tree is ended"):
                    await borrowing.take_all(cast(Channel, Silent()))
        assert [error.errno for error in failed] == [errno.EIO]

    monkeypatch.setattr(paging, "read_events", fail)
    trio.run(main)
    assert not LEDGER.held()


def test_who_watches_over_a_tree_goes_on_when_all_of_a_name_are_told_to_end() -> None:
    """As by `pkill`; it is ended by us."""
    held = LEDGER.held()
    with subprocess.Popen(["sleep", "1000"]) as victim:
        guard = Guard()
        guard.watch_over([HostPid(victim.pid)])
        time.sleep(0.5)  # it has begun
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            os.kill(guard._process.pid, number)
        time.sleep(0.2)
        assert guard.lives
        guard.dismiss()
        assert victim.poll() is None
        victim.kill()
    assert LEDGER.held() == held


@pytest.mark.parametrize("killed", [False, True])
def test_an_alarm_ends_a_tree_though_its_guard_was_killed(killed: bool) -> None:
    begun = len(os.listdir("/proc/self/fd"))
    with subprocess.Popen(["sh", "-c", "sleep 1000 & echo $!; wait"], stdout=subprocess.PIPE) as victim:
        assert victim.stdout is not None
        child = os.pidfd_open(int(victim.stdout.readline()))
        guard = Guard()
        guard.watch_over([HostPid(victim.pid)])
        if killed:
            guard._process.kill()
        guard.alarm()
        assert victim.wait(PATIENCE_S) == -signal.SIGKILL
        assert select.select([child], [], [], PATIENCE_S)[0]
        os.close(child)
    assert len(os.listdir("/proc/self/fd")) == begun


@pytest.mark.root
def test_it_is_calm_when_everything_was_told(subject: Subject) -> None:
    async def scenario(pager: Pager) -> None:
        assert paging.is_calm(subject.fd)
        read_events = paging.read_events
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(paging, "read_events", lambda _: [])
            subject.begin("move")
            while not subject.has_mapped(TO):
                await trio.sleep(0.001)
            assert not paging.is_calm(subject.fd)
        assert paging.read_events is read_events
        await subject.answers("move: True")
        assert paging.is_calm(subject.fd)

    paged(subject, scenario)


@pytest.mark.root
def test_who_misses_nothing_more_is_watched_no_longer() -> None:
    """Nor by the guard; and who has ended misses nothing."""

    async def main(one: Subject, other: Subject, third: Subject) -> None:
        pager = Pager([watched(one, 1), watched(other, 2), watched(third, 3)], [one.pid, other.pid], Guard())
        with trio.fail_after(PATIENCE_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pager.run)
                for number in range(PAGES):
                    await pager.bring(page(number))
                while any("um" in mapping.flags for mapping in smaps.smaps(one.pid)):
                    await trio.sleep(0.01)
                assert any("um" in mapping.flags for mapping in smaps.smaps(other.pid))
                third.end()
                await pager.bring(page(0, 3))
                assert pager.lacking().keys() == {2}
                other.begin("look")
                while not pager.requests:
                    await trio.sleep(0.01)
                for number in range(PAGES):
                    await pager.bring(page(number, 2))
                await other.answers("look: byte 1")
                await pager.whole.wait()

    subjects = [Subject() for _ in range(3)]
    try:
        trio.run(main, *subjects)
    finally:
        for one in subjects:
            one.close()


@pytest.mark.root
@pytest.mark.parametrize("attempt", range(8))
def test_who_is_let_go_of_when_there_are_news_is_not_listened_to(subject: Subject, attempt: int) -> None:
    """Tasks take turns by chance: in half of the attempts the listener is woken, and comes second."""

    async def scenario(pager: Pager) -> None:
        await trio.testing.wait_all_tasks_blocked()
        (memory,) = pager._memories
        subject.begin("look")
        select.select([subject.fd], [], [])  # the fault is there, and nobody was awake to hear of it
        await trio.lowlevel.checkpoint()
        memory.missing.settle(AT, AT + SIZE)
        pager._let_go_of_the_whole()
        await subject.answers("look: byte 0")

    paged(subject, scenario)


@pytest.mark.root
def test_children_wait_to_be_born_where_there_are_too_many(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_events, tries = paging.read_events, itertools.count()

    def read_late(fd: LocalFd) -> list[Event]:
        if next(tries) < 2:
            raise OSError(errno.EMFILE, "too many open files")
        return read_events(fd)

    async def scenario(pager: Pager) -> None:
        monkeypatch.setattr(paging, "read_events", read_late)
        subject.begin("move")
        await subject.answers("move: True")
        assert next(tries) > 2

    paged(subject, scenario)
