"""Memory that outlives its process: the end does not wait for it, and it is given back when it is let go."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipeline.ids import HostPid, RemoteAddress
from pipeline.kernel.lasting import LastingMemory
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.ledger import LEDGER

pytestmark = pytest.mark.root


class Child:
    """A process with a file of its own open and mapped, whose description is only freed when nobody has it mapped."""

    def __init__(self) -> None:
        self.readable, writable = os.pipe()
        mapped = os.memfd_create("mapped")
        os.ftruncate(mapped, PAGE_BYTES)
        memory = mmap.mmap(mapped, PAGE_BYTES)
        memory[0] = 1
        self.page = RemoteAddress(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        self.pid = HostPid(os.fork())
        if self.pid == 0:
            while True:
                signal.pause()
        os.close(writable)
        os.close(mapped)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    yield made
    os.close(made.readable)


def test_a_process_ends_and_its_files_are_closed_while_its_memory_lasts(child: Child) -> None:
    lasting = LastingMemory(child.pid, child.page)
    child.end()
    assert os.read(child.readable, 1) == b"", "its end of the pipe is closed"
    lasting.close()
    lasting.close()
    assert not LEDGER.held()


def test_a_process_that_runs_on_is_as_before(child: Child) -> None:
    LastingMemory(child.pid, child.page).close()
    assert os.waitpid(child.pid, os.WNOHANG) == (0, 0)
    child.end()


def test_who_forks_meanwhile_does_not_stop_it_from_being_given_back(child: Child) -> None:
    lasting = LastingMemory(child.pid, child.page)
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False)
    forked = os.fork()
    if forked == 0:
        signal.pause()
        os._exit(0)
    child.end()
    lasting.close()
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)
    other.communicate(b"\n")


def test_a_memory_that_is_held_twice_lasts_until_nobody_holds_it(child: Child) -> None:
    held = [LastingMemory(child.pid, child.page) for _ in range(2)]
    child.end()
    for one in held:
        one.close()
    assert not LEDGER.held()


def test_an_address_without_a_page_is_an_error(child: Child) -> None:
    with pytest.raises(OSError, match="cannot be read"):
        LastingMemory(child.pid, RemoteAddress(PAGE_BYTES))
    assert not LEDGER.held()
    child.end()
