"""A throttled tree: it gets less done, notices nothing, and has nothing of it when that is over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import pytest
import trio

from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.ledger import LEDGER
from pipeline.remote.tracer import tracer_thread
from pipeline.stages import freeze
from pipeline.stages.throttle import Throttle
from tests.harness.settings import DEPTH_0, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop

pytestmark = pytest.mark.root

_LONG_S = 60.0
#: MiB, and microseconds a page
WRITER = ["4", "20"]


@asynccontextmanager
async def throttled(percentage: int, *pids: int) -> AsyncIterator[list[Throttle]]:
    """Trees that are held back in the block; nothing is held of them after it."""
    async with tracer_thread() as tracer, trio.open_nursery() as nursery, AsyncExitStack() as stack:
        found = [Throttle(tracer, HostPid(pid)) for pid in pids]
        for one in found:
            stack.push_async_callback(one.set, 0)
            nursery.start_soon(one.run)
            await one.set(percentage)
        yield found
        nursery.cancel_scope.cancel()
    for pid in pids:
        assert_free(HostPid(pid))
    assert not LEDGER.held()


def assert_free(root: HostPid) -> None:
    """Nobody traces anything of a tree."""
    for pid in freeze.walk(root):
        with suppress(procfs.ProcessGone):
            for tid in procfs.tasks(pid):
                with suppress(procfs.ProcessGone):
                    assert procfs.status(tid).tracer_pid == 0


def written(tree: Tree) -> int:
    """How many pages `outrunning` has written."""
    return int.from_bytes((tree.directory / "count").read_bytes(), "little")


async def until(what: str, holds: Callable[[], bool]) -> None:
    with trio.move_on_after(_LONG_S):
        while not holds():
            await trio.sleep(0.005)
        return
    raise AssertionError(f"not in time: {what}")


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2], ids=lambda one: one.name)
async def test_a_throttled_tree_gets_less_done_than_one_that_is_not(
    start: Callable[..., Tree], setting: Setting
) -> None:
    held_back, other = (start("outrunning", setting, WRITER) for _ in range(2))
    async with throttled(90, held_back.pid) as (throttle,):
        before = [written(tree) for tree in (held_back, other)]
        await until("slices", lambda: throttle.held_s > 1.0)
        await until("the other one writes", lambda: written(other) > before[1] + 20_000)
        done = [written(tree) - count for tree, count in zip((held_back, other), before, strict=True)]
        assert throttle.percentage == 90
    assert done[0] < done[1] / 2
    count = written(held_back)
    await until("it goes on", lambda: written(held_back) > count + 5_000)
    held_back.check()
    other.check()


async def test_nothing_is_held_back_by_nothing(start: Callable[..., Tree]) -> None:
    tree = start("outrunning", DEPTH_0, WRITER)
    async with throttled(99, tree.pid) as (throttle,):
        await until("it is held back", lambda: throttle.held_s > 0.2)
        await throttle.set(0)
        held_s = throttle.held_s
        assert_free(HostPid(tree.pid))
        count = written(tree)
        await until("it goes on", lambda: written(tree) > count + 5_000)
        assert throttle.held_s == held_s
        await throttle.set(0)
        await throttle.set(50)
        await until("it is held back again", lambda: throttle.held_s > held_s)
    tree.check()


async def test_a_tree_can_be_stopped_for_good_as_soon_as_it_is_not_held_back(
    start: Callable[..., Tree],
) -> None:
    tree = start("outrunning", DEPTH_0, WRITER)
    async with tracer_thread() as tracer, trio.open_nursery() as nursery:
        throttle = Throttle(tracer, HostPid(tree.pid))
        nursery.start_soon(throttle.run)
        for _ in range(10):
            await throttle.set(95)
            await trio.sleep(0.02)
            await throttle.set(0)
            frozen = await tracer.run(freeze.freeze, HostPid(tree.pid), False)
            count = written(tree)
            await trio.sleep(0.01)
            assert written(tree) == count
            await tracer.run(freeze.release, frozen)
        nursery.cancel_scope.cancel()
    assert not LEDGER.held()
    tree.check()


async def test_who_sleeps_is_left_alone(start: Callable[..., Tree]) -> None:
    """Its voluntary switches tell: whoever is stopped has been awake."""
    tree = start("blocked")
    tids = [tid for pid in tree.pids() for tid in procfs.tasks(HostPid(pid))]
    before = {tid: _switches(tid) for tid in tids}
    await trio.sleep(1)
    sleeping = [tid for tid in tids if _switches(tid) == before[tid]]
    assert sleeping, "all wake up by themselves"
    busy = start("outrunning", DEPTH_0, WRITER)
    async with throttled(90, tree.pid, busy.pid) as (_, other):
        await until("others are held back", lambda: other.held_s > 1.0)
        assert {tid: _switches(tid) for tid in sleeping} == {tid: before[tid] for tid in sleeping}
    tree.check()


def _switches(tid: HostPid) -> bytes:
    (line,) = [
        line for line in procfs.read_file(tid, "status").splitlines() if line.startswith(b"voluntary_ctxt")
    ]
    return line


@contextmanager
def running(*command: str, stdin: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdin=stdin, start_new_session=True) as program:
        try:
            yield program
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", ["thread", "first", "end", "leave"])
async def test_who_executes_programs_and_ends_goes_on_to_do_so(workshop: Workshop, how: str) -> None:
    directory = workshop.directory()
    count = directory / "count"
    with running(*workshop.command("restless"), str(directory), how) as program:
        await until("it is started", count.exists)
        async with throttled(80, program.pid):
            size = count.stat().st_size
            await until("it goes on", lambda: count.stat().st_size > size + 300)
        size = count.stat().st_size
        await until("it goes on", lambda: count.stat().st_size > size + 30)
        assert program.poll() is None


async def test_who_was_seized_with_another_number_is_let_go(start: Callable[..., Tree]) -> None:
    """As a thread that executed a program in that moment: nobody has asked for its stop by the number that it has."""
    tree = start("outrunning", DEPTH_0, WRITER)
    writer = HostPid(tree.pids()[-1])
    async with tracer_thread() as tracer, trio.open_nursery() as nursery:
        throttle = Throttle(tracer, HostPid(tree.pid))
        nursery.start_soon(throttle.run)
        await throttle.set(20)
        await until("slices", lambda: throttle.held_s > 0.1)
        with trio.fail_after(_LONG_S):
            while not await tracer.run(seize_if_free, writer):
                await trio.sleep(0.001)
        await throttle.set(0)
        assert_free(HostPid(tree.pid))
        nursery.cancel_scope.cancel()
    assert not LEDGER.held()
    tree.check()


def seize_if_free(tid: HostPid) -> bool:
    if procfs.status(tid).tracer_pid:
        return False
    ptrace.seize(tid)
    return True


_VFORKING = """
import os, sys
while True:
    pid = os.posix_spawn("/bin/true", ["true"], {})
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WCONTINUED)
    assert (found.si_code, found.si_status) == (os.CLD_EXITED, 0), found
    with open(sys.argv[1], "ab", 0) as count:
        count.write(b"x")
"""


async def test_who_waits_for_a_vfork_child_goes_on(workshop: Workshop) -> None:
    count = workshop.directory() / "count"
    with running(sys.executable, "-c", _VFORKING, str(count)) as program:
        await until("it is started", count.exists)
        async with throttled(80, program.pid) as (throttle,):
            size = count.stat().st_size
            await until("it goes on", lambda: count.stat().st_size > size + 100)
            assert throttle.held_s > 0
        assert program.poll() is None


_TELLING_NEWS = """
import os, sys
pid = os.posix_spawn("/bin/sh", ["sh", "-c", "while :; do :; done"], {})
with open(sys.argv[1], "a", buffering=1) as news:
    print(pid, file=news)
    while True:
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WCONTINUED)
        print(found.si_code, found.si_status, file=news)
        if found.si_code not in (os.CLD_STOPPED, os.CLD_CONTINUED):
            break
"""


async def test_a_parent_hears_of_what_others_do_and_of_nothing_else(workshop: Workshop) -> None:
    news = workshop.directory() / "news"
    with running(sys.executable, "-c", _TELLING_NEWS, str(news)) as program:
        await until("it is started", lambda: news.exists() and news.read_text().endswith("\n"))
        pid = HostPid(int(news.read_text()))
        expected = [str(pid)]
        async with throttled(90, pid) as (throttle,):
            for number, code in [(signal.SIGSTOP, os.CLD_STOPPED), (signal.SIGCONT, os.CLD_CONTINUED)] * 20:
                held_s = throttle.held_s
                await until("slices", lambda before=held_s: throttle.held_s > before)
                os.kill(pid, number)
                expected.append(f"{code} {number.value}")
                await until(expected[-1], lambda: len(news.read_text().splitlines()) == len(expected))
            os.kill(pid, signal.SIGSTOP)
            expected.append(f"{os.CLD_STOPPED} {signal.SIGSTOP.value}")
            await until("it is stopped", lambda: procfs.stat(pid).state == "T")
            held_s = throttle.held_s
            await until("slices", lambda: throttle.held_s > held_s + 0.2)
            assert procfs.stat(pid).state == "T"
        assert procfs.stat(pid).state == "T"
        os.kill(pid, signal.SIGKILL)
        expected.append(f"{os.CLD_KILLED} {signal.SIGKILL.value}")
        assert await trio.to_thread.run_sync(program.wait, _LONG_S) == 0
    assert news.read_text().splitlines() == expected


#: the first of its threads ends by exit(2), and the other one as soon as a file is there
_LEADERLESS = """
import ctypes, os, sys, threading
def other():
    while not os.path.exists(sys.argv[1]):
        pass
threading.Thread(target=other).start()
sys.stdin.read()
ctypes.CDLL(None).syscall(60, 0)
"""


async def test_a_first_thread_that_ended_just_before_it_was_stopped(workshop: Workshop) -> None:
    """Its tracer hears of it when the others have ended, too, and only then their parent does."""
    over = workshop.directory() / "over"
    parent = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', *sys.argv[1:]]))"
    command = (sys.executable, "-c", parent, _LEADERLESS, str(over))
    with running(*command, stdin=subprocess.PIPE) as program:
        await until("its child runs", lambda: bool(procfs.children(HostPid(program.pid))))
        (root,) = procfs.children(HostPid(program.pid))
        await until("its threads", lambda: len(procfs.tasks(root)) == 2)
        async with tracer_thread() as tracer, trio.open_nursery() as nursery:
            throttle = Throttle(tracer, root)
            nursery.start_soon(throttle.run)
            await tracer.run(ptrace.seize, root)
            assert program.stdin is not None
            program.stdin.close()
            await until("it ends", lambda: procfs.stat(root).state == "Z")
            await throttle.set(50)
            over.touch()
            assert await trio.to_thread.run_sync(program.wait, _LONG_S) == 0
            await throttle.set(0)
            nursery.cancel_scope.cancel()
    assert not LEDGER.held()


async def test_a_tree_that_ends_is_not_kept() -> None:
    parent = "import subprocess, sys; sys.exit(-subprocess.call([sys.executable, '-c', 'while True: pass']))"
    with running(sys.executable, "-c", parent) as program:
        await until("its child is started", lambda: bool(procfs.children(HostPid(program.pid))))
        (root,) = procfs.children(HostPid(program.pid))
        async with throttled(99, root) as (throttle,):
            await until("it is held back", lambda: throttle.held_s > 0.1)
            os.kill(root, signal.SIGTERM)
            assert await trio.to_thread.run_sync(program.wait, _LONG_S) == signal.SIGTERM
