"""Who keeps a pid from being given out: the living, and the dead that nobody has collected yet."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.remote.births import _is_dead, _named


@contextmanager
def orphan_of_a_session() -> Iterator[tuple[int, int]]:
    """The number of a session whose leader is gone, and its one member, which waits; a subreaper is our test's."""
    reader, writer = os.pipe()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        member = os.fork()
        if member == 0:
            signal.pause()
            os._exit(0)
        os.write(writer, member.to_bytes(4, "little"))
        os._exit(0)
    member = int.from_bytes(os.read(reader, 4), "little")
    os.close(reader)
    os.close(writer)
    os.waitpid(leader, 0)
    try:
        yield leader, member
    finally:
        os.kill(member, signal.SIGKILL)
        os.waitpid(member, 0)


def test_a_number_is_held_by_a_session_until_its_last_member_is_collected() -> None:
    with orphan_of_a_session() as (leader, member):
        assert not os.path.exists(f"/proc/{leader}")
        assert not _is_dead(leader)
        assert "group or session" in _named(leader)
        assert f", pid {member})" in _named(leader)
        os.kill(member, signal.SIGKILL)
        os.waitid(os.P_PID, member, os.WEXITED | os.WNOWAIT)
        assert _is_dead(leader)
    assert not _is_dead(leader)
    assert not _named(leader)


def test_a_living_process_is_named() -> None:
    assert not _is_dead(os.getpid())
    assert f", pid {os.getpid()})" in _named(os.getpid())
