"""Through what devices may write into a process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.resources.memory import devices

MINE = HostPid(os.getpid())


@contextmanager
def held(*fds: int) -> Iterator[None]:
    try:
        yield
    finally:
        for fd in fds:
            os.close(fd)


def direct_file(path: Path) -> tuple[int, ...]:
    return (os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT),)


def plain_file(path: Path) -> tuple[int, ...]:
    return (os.open(path, os.O_RDWR | os.O_CREAT),)


def pipe_of_packets(_: Path) -> tuple[int, ...]:
    return os.pipe2(os.O_DIRECT)


def named_pipe_of_packets(path: Path) -> tuple[int, ...]:
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_DIRECT)
    return (fd,)


def ring(_: Path) -> tuple[int, ...]:
    parameters = ctypes.create_string_buffer(120)
    try:
        return (syscall(NR.io_uring_setup, 1, ctypes.addressof(parameters)),)
    except OSError as error:
        pytest.skip(f"this kernel makes no ring of io_uring: {error}")


@pytest.mark.parametrize(
    ("make", "is_way_in"),
    [
        (direct_file, True),
        (ring, True),
        (plain_file, False),
        (pipe_of_packets, False),
        (named_pipe_of_packets, False),
    ],
)
def test_a_way_in_is_seen_while_it_is_open(
    tmp_path: Path, make: Callable[[Path], tuple[int, ...]], is_way_in: bool
) -> None:
    assert not devices.may_write_to(MINE)
    with held(*make(tmp_path / "file")):
        assert devices.may_write_to(MINE) == is_way_in
    assert not devices.may_write_to(MINE)


@pytest.mark.parametrize(
    ("make", "is_way_in"),
    [(direct_file, True), (ring, True), (plain_file, False), (os.pipe, False), (pipe_of_packets, True)],
)
def test_what_may_not_be_named_is_known_by_what_is_said_of_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[..., tuple[int, ...]],
    is_way_in: bool,
) -> None:
    """Links of a process that runs with another id: a pipe of packets then looks like a file."""

    def refused(path: bytes) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    with held(*(make(tmp_path / "file") if make is not os.pipe else os.pipe())):
        monkeypatch.setattr(os, "readlink", refused)
        assert devices.may_write_to(MINE) == is_way_in


def test_nobody_writes_to_who_has_ended() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert not devices.may_write_to(HostPid(child))
    os.waitpid(child, 0)
    assert not devices.may_write_to(HostPid(child))
