"""Which descriptors of several processes are of one open file."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.ledger import LEDGER
from pipeline.stages.open_files import OpenFiles


@contextmanager
def child(act: Callable[[], object]) -> Iterator[HostPid]:
    """A process that has done `act`, and waits."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os.write(done, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1)
        yield HostPid(pid)
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_the_same_number_is_the_same_file_only_if_it_was_inherited() -> None:
    first, second = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
    try:
        with (
            child(lambda: None) as heir,
            child(lambda: os.dup2(second, first)) as other,
            child(lambda: os.dup2(os.open("/dev/null", os.O_RDONLY), first)) as stranger,
            OpenFiles() as found,
        ):
            found.collect([heir, other, stranger], still=False, status_of=procfs.status)
            assert not found.blockers
            numbers = {pid: found.file_at(pid, first) for pid in (heir, other, stranger)}
            assert len(set(numbers.values())) == 3
            assert {found.file_at(pid, second) for pid in numbers} == {numbers[other]}
            assert set(found.holders(numbers[other])) >= {
                (heir, second),
                (other, first),
                (other, second),
                (stranger, second),
            }
    finally:
        os.close(first)
        os.close(second)
    assert not LEDGER.held()


@pytest.mark.parametrize("failing", [1, 2, 10**6])
def test_a_number_that_is_taken_again_at_once_is_looked_at_again(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = procfs.fdinfo, 0
    fd = os.open("/dev/null", os.O_RDONLY)

    def closed_meanwhile(pid: HostPid, number: int) -> dict[str, list[str]]:
        nonlocal calls
        if number == fd:
            calls += 1
            if calls <= failing:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real(pid, number)

    try:
        with child(lambda: None) as pid, OpenFiles() as found:
            monkeypatch.setattr(procfs, "fdinfo", closed_meanwhile)
            found.collect([pid], still=False, status_of=procfs.status)
            assert (fd in {entry.fd for entry in found.slots[pid]}) == (failing < 10)
            assert [blocker.subject for blocker in found.blockers] == (
                [] if failing < 10 else [f"pid {pid} fd {fd}"]
            )
    finally:
        os.close(fd)
    assert not LEDGER.held()
