"""System V objects of somebody who has no number in the user namespace that owns their ipc namespace."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Extent, Namespace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, setns, syscall, unshare
from pipeline.userns.forest import Forest
from pipeline.userns.idmap import IdMap
from pipeline.userns.visit import read_file, visit
from tests.userns.making import captured, held, in_child, making, other_keepers, own_namespace

pytestmark = pytest.mark.root

INSIDE = Extent(100_000, 100_000, 65_536)


@contextmanager
def with_objects() -> Iterator[tuple[Namespace, Forest]]:
    """An ipc namespace with a queue of its root, and with an object of each kind of 44:45, whom it does not map."""

    def own() -> None:
        unshare(CLONE.NEWIPC)
        Path("/proc/sys/kernel/msgmax").write_text("4096")
        syscall(NR.msgget, 6, 0o1600)

    def from_outside() -> None:
        setns(os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY), CLONE.NEWIPC)
        os.setresgid(45, 45, 45)
        os.setresuid(44, 44, 44)
        syscall(NR.shmget, 5, 4096, 0o1640)
        syscall(NR.semget, 5, 2, 0o1640)
        syscall(NR.msgget, 5, 0o1640)

    with held(own, "0 100000 65536") as pid:
        in_child(from_outside)
        capture, forest = captured(pid)
        assert not capture.blockers
        yield own_namespace(capture, "ipc"), forest


def empty(_: int) -> LocalFd:
    """What the segment holds."""
    fd = os.memfd_create("content")
    os.ftruncate(fd, 4096)
    return LocalFd(fd)


def placed(forest: Forest, *lines: Extent) -> Forest:
    outside = IdMap([Extent(0, 0, 1), INSIDE, *lines])
    return Forest(forest.namespaces.values(), {"uid": outside, "gid": outside})


def creators(pid: HostPid, kind: str) -> list[tuple[int, int]]:
    """Who made the objects of a kind in the ipc namespace of `pid`, as we see them."""
    fd = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY)
    try:
        text = visit([(fd, CLONE.NEWIPC)], lambda: read_file(f"/proc/sysvipc/{kind}"))
    finally:
        os.close(fd)
    head, *lines = (line.split() for line in text.decode().splitlines())
    return [(int(line[head.index("cuid")]), int(line[head.index("cgid")])) for line in lines]


def test_they_are_said_where_they_have_numbers() -> None:
    with with_objects() as (record, _):
        own, theirs = (queue[1][2:] for queue in record.state["queues"])
        assert own == [[1, 0]] * 4
        assert theirs == [[0, 44], [0, 45]] * 2


@pytest.mark.parametrize("to", [44, 1044])
def test_they_are_theirs_again(to: int) -> None:
    contents: list[LocalFd] = []

    def content(space: int) -> LocalFd:
        contents.append(empty(space))
        return contents[-1]

    with with_objects() as (record, forest):
        forest = placed(forest, Extent(44, to, 2))
        with making(forest, {record.index: record}, content) as keepers:
            again = other_keepers(keepers)[record.index].pid
            assert creators(again, "msg") == [(100_000, 100_000), (to, to + 1)]
            assert creators(again, "sem") == creators(again, "shm") == [(to, to + 1)]
            fd = os.open(f"/proc/{again}/ns/ipc", os.O_RDONLY)
            assert visit([(fd, CLONE.NEWIPC)], lambda: read_file("/proc/sys/kernel/msgmax")) == b"4096\n"
            os.close(fd)
    for fd in contents:
        os.close(fd)


def test_who_has_no_place_is_named() -> None:
    said = "an object belongs to 44:45, made by 44:45, who has no place here .*--unmapped overflow"
    with with_objects() as (record, forest):
        fd = empty(0)
        with (
            pytest.raises(RebuildError, match=said),
            making(placed(forest), {record.index: record}, lambda _: fd),
        ):
            pass
        os.close(fd)
