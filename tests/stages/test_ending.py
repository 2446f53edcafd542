"""Whether the end of a tree is waited for: not where only what is here sees what it still writes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Record
from pipeline.kernel.statfs import Magic, filesystem
from pipeline.policy import DumpPolicy
from pipeline.resources.kinds import FdView
from pipeline.resources.multicast import Membership
from pipeline.resources.udp_socket import UdpState
from pipeline.stages import ending
from pipeline.stages.ending import may_be_seen

HERE = HostPid(os.getpid())
FAR = [Magic.NFS, Magic.FUSE, 0xFE534D42, 0x01021997, 0x19830326]


def seen(
    views: Sequence[FdView],
    mapped_on: Sequence[int],
    *states: Record | None,
    policy: DumpPolicy | None = None,
) -> bool:
    return may_be_seen(views, mapped_on, states, policy or DumpPolicy())


@contextmanager
def opened(path: str | Path, flags: int) -> Iterator[FdView]:
    fd = os.open(path, flags, 0o600)
    try:
        yield FdView(HERE, fd, LocalFd(fd), os.fsencode(path), os.fstat(fd), {}, flags, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_files_that_everybody_here_sees_alike(tmp_path: Path, flags: int) -> None:
    with opened(tmp_path / "a", flags | os.O_CREAT) as view:
        if filesystem(view.local) not in ending._LOCAL:
            pytest.skip("files of tests are not on a local file system here")
        assert not seen([view], [])


@pytest.mark.parametrize("magic", FAR)
@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR])
def test_files_that_others_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: int, flags: int
) -> None:
    monkeypatch.setattr(ending, "filesystem", lambda _: magic)
    with opened(tmp_path / "a", flags | os.O_CREAT) as view:
        assert seen([view], [])


def test_each_file_system_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        opened(tmp_path / "a", os.O_RDWR | os.O_CREAT) as here,
        opened("/dev/shm", os.O_TMPFILE | os.O_RDWR) as there,
    ):
        if here.stat.st_dev == there.stat.st_dev:
            pytest.skip("files of tests are in /dev/shm here")
        for far in (here, there):
            found = {one.local: Magic.NFS if one is far else Magic.EXT4 for one in (here, there)}
            monkeypatch.setattr(ending, "filesystem", found.get)
            assert seen([here, there], [])


def test_who_only_reads_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "filesystem", lambda _: Magic.NFS)
    with opened(tmp_path / "a", os.O_RDONLY | os.O_CREAT) as file, opened(tmp_path, os.O_RDONLY) as folder:
        assert not seen([file, folder], [])


def test_what_is_no_file_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "filesystem", lambda _: Magic.NFS)
    one, other = socket.socketpair()
    with one, other, opened("/dev/null", os.O_RDWR) as device:
        views = [
            FdView(
                HERE,
                end.fileno(),
                LocalFd(end.fileno()),
                b"socket:",
                os.fstat(end.fileno()),
                {},
                os.O_RDWR,
                0,
            )
            for end in (one, other)
        ]
        assert not seen([*views, device], [])


def test_a_file_system_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(_: int) -> int:
        raise OSError

    monkeypatch.setattr(ending, "filesystem", stale)
    with opened(tmp_path / "a", os.O_RDWR | os.O_CREAT) as view:
        assert seen([view], [])


def test_block_devices_are_written_when_they_are_closed() -> None:
    like = os.stat("/dev/null")
    device = os.stat_result((0o060600, *like[1:]))
    view = FdView(HERE, 3, LocalFd(3), b"/dev/sda", device, {}, os.O_RDWR, 0)
    assert seen([view], [])


@pytest.mark.parametrize("magic", FAR)
def test_mapped_files_that_others_may_see(magic: int) -> None:
    assert seen([], [Magic.EXT4, magic])
    assert not seen([], [Magic.EXT4])


def test_who_leaves_a_multicast_group_says_so() -> None:
    what: Any = None
    assert not seen([], [], None, UdpState(socket=what))
    assert seen([], [], None, UdpState(socket=what, groups=[Membership(b"eth0", bytes([239, 1, 2, 3]))]))


def test_connections_that_are_closed_say_so() -> None:
    assert seen([], [], policy=DumpPolicy(tcp="close"))
