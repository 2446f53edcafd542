"""What is read beside everything else is what would be read in its place, and nothing of the reading is left."""

from __future__ import annotations

import os
import threading

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.smaps import smaps
from pipeline.stages.ahead import MappingReader


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("smaps")]


@pytest.fixture
def child() -> HostPid:
    """One that sleeps, and is ended by the test."""
    pid = os.fork()
    if pid == 0:
        while True:
            threading.Event().wait()
    return HostPid(pid)


def test_every_process_is_read_who_is_there(child: HostPid) -> None:
    ended = os.fork()
    if ended == 0:
        os._exit(0)
    os.waitpid(ended, 0)
    try:
        with MappingReader() as reader, reader.ahead([child, HostPid(ended)]) as ahead:
            assert [one[:7] for one in ahead.of(child)] == [one[:7] for one in smaps(child)]
            with pytest.raises(procfs.ProcessGone):
                ahead.of(HostPid(ended))
            assert readers()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert not readers()


def test_whoever_fails_meanwhile_leaves_no_reader() -> None:
    pids = [HostPid(os.getpid()), HostPid(os.getppid())] * 3
    with MappingReader() as reader:
        reader.start()
        with pytest.raises(KeyError), reader.ahead(pids) as ahead:
            ahead.of(HostPid(0))
        assert all(one.done() for one in ahead._read.values())
        with reader.ahead(pids) as again:
            assert again.of(pids[0])
        assert len(readers()) == 1
    assert not readers()
