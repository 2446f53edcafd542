"""What is lent of a target that stands still: it is given back before the target goes on, whoever is killed."""

from __future__ import annotations

import errno
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from pipeline.errors import ChildKilled
from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import syscall
from pipeline.ledger import LEDGER
from pipeline.resources.shielded import Shield
from tests.harness.tree import ROOT

#: stops the pid that is given, and has its state lent until there is a file "back"; says the pid of who does it
LENDING = """
import os, pathlib, sys, time
from pipeline.kernel import ptrace
from pipeline.resources.shielded import shielded

def act():
    pathlib.Path("lent").write_text(str(os.getpid()))
    while not pathlib.Path("back").exists():
        time.sleep(0.001)
    pathlib.Path("given").write_bytes(b"")
    return bytes(1 << 20)

target = int(sys.argv[1])
ptrace.seize(target)
ptrace.interrupt(target)
ptrace.wait(target)
assert shielded(act) == bytes(1 << 20)
print("whole", flush=True)
"""
#: the same in a thread of its own, as the pipeline does it; the main thread waits
IN_A_THREAD = f"""
import threading
def lend():
    {"    ".join(LENDING.splitlines(keepends=True))}
one = threading.Thread(target=lend)
one.start()
one.join()
"""
#: the same by a child that was there before
STANDING_BY = LENDING.replace("import shielded", "import Shield").replace(
    "target = int", "shield = Shield()\nshield.start()\ntarget = int"
).replace("shielded(act)", "shield.run(act, [])").replace("def act():", "def act(_):")  # fmt: skip
#: lets anybody of its user trace it, where Yama would not (PR_SET_PTRACER_ANY)
WILLING = """
import ctypes, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))
print(flush=True)
time.sleep(1000)
"""
_PATIENCE_S = 30


@pytest.fixture
def target() -> Iterator[HostPid]:
    with subprocess.Popen([sys.executable, "-c", WILLING], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield HostPid(process.pid)
        finally:
            process.kill()


class Lenders:
    """Processes that lend; all of them end with the test."""

    def __init__(self, folder: Path, ends: ExitStack) -> None:
        self._folder = folder
        self._ends = ends

    def begin(self, script: str, target: HostPid) -> subprocess.Popen[str]:
        lender = subprocess.Popen(
            [sys.executable, "-c", script, str(target)],
            cwd=self._folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._ends.callback(lender.communicate)
        self._ends.callback(lender.kill)
        return lender

    def lend(self, script: str, target: HostPid) -> tuple[subprocess.Popen[str], HostPid]:
        """Start one; with the pid of the child that has the loan."""
        lender = self.begin(script, target)
        lent = self._folder / "lent"
        until(lambda: lent.exists() and lent.read_text() != "")
        child = int(lent.read_text())
        self._ends.callback(os.close, pidfd := os.pidfd_open(child))
        self._ends.callback(kill, pidfd)
        return lender, HostPid(child)


@pytest.fixture
def lenders(tmp_path: Path) -> Iterator[Lenders]:
    with ExitStack() as ends:
        yield Lenders(tmp_path, ends)


def kill(pidfd: int) -> None:
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.002)


def is_held(target: HostPid) -> bool:
    return procfs.stat(target).state == "t"


@pytest.mark.parametrize(
    "script", [LENDING, IN_A_THREAD, STANDING_BY], ids=["main-thread", "thread", "standing-by"]
)
def test_the_target_stands_still_until_the_loan_of_a_killed_lender_is_over(
    script: str, target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    lender, _ = lenders.lend(script, target)
    lender.kill()
    time.sleep(0.1)
    assert is_held(target), "it runs with its state lent"
    (tmp_path / "back").touch()
    lender.communicate(timeout=_PATIENCE_S)
    assert (tmp_path / "given").exists()
    until(lambda: not is_held(target))


def test_a_killed_child_ends_neither_lender_nor_stillness(
    target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    lender, child = lenders.lend(LENDING, target)
    os.kill(child, signal.SIGKILL)
    out, _ = lender.communicate(timeout=_PATIENCE_S)
    assert lender.returncode == 1, "the loan failed with an OSError"
    assert "whole" not in out
    until(lambda: not is_held(target))


@pytest.mark.parametrize("script", [LENDING, IN_A_THREAD], ids=["main-thread", "thread"])
def test_a_signal_for_the_lender_neither_blocks_nor_is_lost(
    script: str, target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    counting = "import signal\nsignal.signal(signal.SIGUSR1, lambda *_: print('heard', flush=True))\n"
    lender, _ = lenders.lend(counting + script, target)
    for task in procfs.tasks(HostPid(lender.pid)):
        syscall(NR.tgkill, lender.pid, task, signal.SIGUSR1)
    (tmp_path / "back").touch()
    out, _ = lender.communicate(timeout=_PATIENCE_S)
    assert lender.returncode == 0
    assert {"heard", "whole"} <= set(out.split())


def test_who_is_traced_by_somebody_else_lends_all_the_same(
    target: HostPid, lenders: Lenders, tmp_path: Path
) -> None:
    waiting = "import pathlib, time\nwhile not pathlib.Path('traced').exists(): time.sleep(0.001)\n"
    lender = lenders.begin(waiting + LENDING, target)
    ptrace.seize(lender.pid)
    (tmp_path / "traced").touch()
    (tmp_path / "back").touch()
    while not (stop := ptrace.wait(lender.pid)).exited:
        ptrace.cont(lender.pid, 0 if stop.event else stop.signal)
    assert lender.stdout is not None
    assert lender.stdout.read().split() == ["whole"]


# -- a child that is there before it is needed ---------------------------------------------------


def identify(fds: list[LocalFd], *more: object) -> bytes:
    """Who acts, and what of."""
    return pickle.dumps((os.getpid(), [os.fstat(fd).st_ino for fd in fds], more))


def held_by_the_child(_: list[LocalFd]) -> bytes:
    """Its descriptors; that of the directory is closed by now."""
    held = [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
    return pickle.dumps([os.readlink(f"/proc/self/fd/{fd}") for fd in held])


def repeat(_: list[LocalFd], content: bytes, times: int) -> bytes:
    return content * times


def fail(_: list[LocalFd], error: Exception) -> bytes:
    raise error


def end(_: list[LocalFd]) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.fixture(params=["started", "not started"])
def shield(request: pytest.FixtureRequest) -> Iterator[Shield]:
    held = LEDGER.held()
    one = Shield()
    if request.param == "started":
        one.start()
        one.start()
    yield one
    one.close()
    one.close()
    assert LEDGER.held() == held


def test_it_acts_on_the_same_files(shield: Shield, tmp_path: Path) -> None:
    files = [(tmp_path / str(number)).open("wb") for number in range(300)]
    wanted = [os.fstat(file.fileno()).st_ino for file in files]
    held = len(os.listdir("/proc/self/fd"))
    for count in (0, 1, 300, 2):
        some = [LocalFd(file.fileno()) for file in files[:count]]
        child, found, more = pickle.loads(shield.run(identify, some, "a", 7))
        assert child != os.getpid()
        assert (found, more) == (wanted[:count], ("a", 7))
    assert len(os.listdir("/proc/self/fd")) == held
    for file in files:
        file.close()


def test_one_child_for_all(tmp_path: Path) -> None:
    shield = Shield()
    shield.start()
    children = {pickle.loads(shield.run(identify, []))[0] for _ in range(5)}
    assert len(children) == 1
    shield.close()
    assert not os.path.exists(f"/proc/{children.pop()}")


def test_it_holds_nothing_of_ours(tmp_path: Path) -> None:
    """Or whoever waits for the end of what we write would wait for the child, too."""
    with (tmp_path / "ours").open("wb") as ours:
        shield = Shield()
        shield.start()
        there = f"/proc/{shield._child}/fd"
        at_once = [os.readlink(f"{there}/{fd}") for fd in os.listdir(there)]
        shield.run(identify, [LocalFd(ours.fileno())])
        held = pickle.loads(shield.run(held_by_the_child, []))
        shield.close()
    assert str(tmp_path / "ours") not in at_once, "a tree whose file it is would be refused"
    assert str(tmp_path / "ours") not in held
    for names in (at_once, held):
        (own,) = {*names} - {"/dev/null"}
        assert own.startswith("socket:"), "a tree may have our standard output, too"


def test_answers_of_any_size(shield: Shield) -> None:
    for times in (0, 1, 1 << 20):
        assert shield.run(repeat, [], b"12345678", times) == b"12345678" * times


@pytest.mark.parametrize(
    "error", [OSError(errno.EPERM, "no"), OSError("without one"), ValueError("a mistake")]
)
def test_what_fails(shield: Shield, error: Exception) -> None:
    with pytest.raises(OSError) as raised:
        shield.run(fail, [], error)
    if isinstance(error, OSError) and error.errno:
        assert raised.value.errno == errno.EPERM
    assert shield.run(repeat, [], b"a", 2) == b"aa", "it goes on"


def test_a_child_that_is_killed_while_it_acts(shield: Shield) -> None:
    with pytest.raises(OSError, match="killed"):
        shield.run(end, [])
    assert shield.run(repeat, [], b"a", 2) == b"aa"


def test_a_child_that_was_killed_before(shield: Shield) -> None:
    child = pickle.loads(shield.run(identify, []))[0]
    with suppress(ProcessLookupError):  # it has ended, where it is not there before
        os.kill(child, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{child}") or procfs.stat(HostPid(child)).state == "Z")
    assert shield.run(repeat, [], b"a" * (1 << 20), 2) == b"a" * (2 << 20)


def wait_for(_: list[LocalFd], path: str) -> bytes:
    until(lambda: os.path.exists(path))
    return b"there"


@pytest.fixture
def standing_by() -> Iterator[Shield]:
    shield = Shield()
    shield.start()
    yield shield
    shield.close()


def test_what_is_begun_is_done_while_we_go_on(standing_by: Shield, tmp_path: Path) -> None:
    for number in range(2):
        assert standing_by.begin(wait_for, [], str(tmp_path / f"{number}"))
        (tmp_path / f"{number}").touch()
        assert standing_by.end() == b"there"


def test_what_is_begun_is_told_behind_another_act(standing_by: Shield) -> None:
    assert standing_by.begin(repeat, [], b"a", 1 << 20)
    assert standing_by.run(repeat, [], b"b", 2) == b"bb"
    standing_by.settle()
    assert standing_by.end() == b"a" * (1 << 20)
    with pytest.raises(ChildKilled):
        standing_by.end()


def test_what_nobody_asks_for_is_told_to_nobody(standing_by: Shield) -> None:
    assert standing_by.begin(repeat, [], b"a", 2)
    assert standing_by.begin(repeat, [], b"b", 2)
    assert standing_by.end() == b"bb"
    assert standing_by.begin(repeat, [], b"c", 2)
    standing_by.close()


def test_once_it_has_settled_the_child_holds_nothing(standing_by: Shield, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        assert standing_by.begin(wait_for, [LocalFd(file.fileno())], str(tmp_path / "now"))
        timer = threading.Timer(0.1, (tmp_path / "now").touch)
        timer.start()
        standing_by.settle()
        there = f"/proc/{standing_by._child}/fd"
        assert str(tmp_path / "file") not in [os.readlink(f"{there}/{fd}") for fd in os.listdir(there)]
        timer.join()


def test_what_is_begun_and_fails(standing_by: Shield) -> None:
    assert standing_by.begin(fail, [], OSError(errno.EPERM, "no"))
    with pytest.raises(PermissionError):
        standing_by.end()
    assert standing_by.begin(end, [])
    assert standing_by.run(repeat, [], b"a", 2) == b"aa", "by another child"
    with pytest.raises(ChildKilled):
        standing_by.end()
    assert not standing_by.begin(repeat, [], b"a", 2), "there is no child any more"
    assert not Shield().begin(repeat, [], b"a", 2)


def test_it_ends_with_us(lenders: Lenders, target: HostPid, tmp_path: Path) -> None:
    script = STANDING_BY.replace("ptrace.seize(target)", "print(shield._child, flush=True); time.sleep(1000)")
    lender = lenders.begin(script, target)
    assert lender.stdout is not None
    child = int(lender.stdout.readline())
    pidfd = os.pidfd_open(child)
    lender.kill()
    try:
        assert select.select([pidfd], [], [], _PATIENCE_S)[0], "the child has outlived us"
    finally:
        os.close(pidfd)
