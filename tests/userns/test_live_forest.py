"""Forests made by the kernel, asked from inside, and read again."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import Extent, Id, UserNamespace
from pipeline.kernel import nsfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.userns.capture import LiveForest
from pipeline.userns.forest import Forest
from pipeline.userns.idmap import NO_ID, parse
from pipeline.userns.visit import visit
from tests.userns.forests import forests
from tests.userns.making import making, user_pids

pytestmark = pytest.mark.root


def read_again(pids: dict[int, HostPid], members: bool) -> Forest:
    """The forest as `LiveForest` reads it, with the numbers that the namespaces had."""
    live = LiveForest()
    if members:
        live.learn_members(pids.values())
    old = {0: 0}
    for index, pid in pids.items():
        fd = nsfs.open_namespace(pid, "user")
        try:
            old[live.number_of(fd)] = index
        finally:
            os.close(fd)

    def renumbered(record: UserNamespace) -> UserNamespace:
        owner = record.owner
        return UserNamespace(
            index=old[record.index],
            parent=old[record.parent] if record.parent is not None else None,
            owner=Id(old[owner.ns], owner.id) if owner is not None else None,
            uid_map=record.uid_map,
            gid_map=record.gid_map,
            setgroups=record.setgroups,
            limits=record.limits,
        )

    return Forest(map(renumbered, live.records))


def ask(pid: HostPid, name: str) -> bytes:
    """A file of /proc/self, read by a visitor of the user namespace of `pid`."""
    fd = nsfs.open_namespace(pid, "user")

    def look() -> bytes:
        file = os.open(f"/proc/self/{name}", os.O_RDONLY)
        return b"".join(iter(lambda: os.read(file, 1 << 16), b""))

    try:
        return visit([(fd, CLONE.NEWUSER)], look)
    finally:
        os.close(fd)


def in_kernel_order(extents: list[Extent]) -> list[Extent]:
    """Up to five lines are kept as written; more are sorted."""
    return sorted(extents, key=lambda extent: extent.inner) if len(extents) > 5 else extents


def as_kernel_says(forest: Forest) -> dict[int, UserNamespace]:
    return {
        n.index: UserNamespace(
            index=n.index,
            parent=n.parent,
            owner=n.owner,
            uid_map=in_kernel_order(list(n.uid_map)),
            gid_map=in_kernel_order(list(n.gid_map)),
            setgroups=n.setgroups,
        )
        for n in forest.namespaces.values()
    }


def check(forest: Forest) -> None:
    with making(forest) as keepers:
        pids = user_pids(keepers)
        expected = as_kernel_says(forest)
        for index, pid in pids.items():
            assert parse(ask(pid, "uid_map")) == list(expected[index].uid_map)
            assert parse(ask(pid, "gid_map")) == list(expected[index].gid_map)
            assert ask(pid, "setgroups").decode().strip() == expected[index].setgroups
        for members in (True, False):
            assert read_again(pids, members).namespaces == expected


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(forests(most=5, lines=8))
def test_random_forests_are_read_as_they_were_made(forest: Forest) -> None:
    check(forest)


def chain(*maps: list[Extent], setgroups: str = "allow", owners: tuple[int, ...] = ()) -> Forest:
    records = [UserNamespace(index=0)]
    for index, extents in enumerate(maps, 1):
        records.append(
            UserNamespace(
                index=index,
                parent=index - 1,
                owner=Id(
                    index - 1, owners[index - 1] if owners else (maps[index - 2][0].inner if index > 1 else 0)
                ),
                uid_map=extents,
                gid_map=extents,
                setgroups=setgroups,  # type: ignore[arg-type]
            )
        )
    return Forest(records)


PARTICULAR = {
    "five deep": chain(
        [Extent(0, 100_000, 65_536)],
        [Extent(0, 1000, 100)],
        [Extent(0, 5, 3)],
        [Extent(1, 1, 2)],
        [Extent(9, 2, 1)],
    ),
    "one id": chain([Extent(0, 0, 1)], [Extent(0, 0, 1)], [Extent(0, 0, 1)], setgroups="deny"),
    "one id, not 0": chain([Extent(1000, 0, 1)], [Extent(77, 1000, 1)], setgroups="deny"),
    "without 0": chain([Extent(1000, 200_000, 2)], [Extent(5, 1001, 1)]),
    "lines that touch": chain(
        [Extent(0, 1000, 1), Extent(1, 2000, 1)],
        [Extent(0, 0, 1), Extent(1, 1, 1)],
    ),
    "unsorted": chain(
        [Extent(5, 300_000, 5), Extent(0, 100_000, 5)],
        [Extent(3, 7, 1), Extent(0, 2, 1)],
    ),
    "all ids": chain([Extent(0, 0, NO_ID)], [Extent(0, 0, NO_ID)]),
    "owners": chain([Extent(0, 100_000, 65_536)], [Extent(0, 0, 65_536)], owners=(4000, 33)),
    "340 lines": chain(
        [Extent(2 * n, 1000 + n, 1) for n in range(340)],
        [Extent(0, 678, 1), Extent(1, 0, 1)],
    ),
    "31 deep": chain(*[[Extent(0, 0, 10)]] * 31),
}


@pytest.mark.parametrize("forest", PARTICULAR.values(), ids=PARTICULAR.keys())
def test_particular_forests_are_read_as_they_were_made(forest: Forest) -> None:
    check(forest)


def test_maps_that_were_never_written_stay_unwritten() -> None:
    check(Forest([UserNamespace(index=0), UserNamespace(index=1, parent=0, owner=Id(0, 0))]))


def test_limits_of_a_user_namespace_are_set_again() -> None:
    forest = chain([Extent(0, 100_000, 65_536)], [Extent(7, 1000, 1)])
    limited = replace(forest.namespaces[2], limits={"max_user_namespaces": 0, "max_pid_namespaces": 3})
    forest = Forest([forest.namespaces[0], forest.namespaces[1], limited])
    with making(forest) as keepers:
        keepers.set_limits()
        assert read_again(user_pids(keepers), members=True).namespaces == forest.namespaces
        with pytest.raises(OSError, match="ENOSPC"):
            keepers.seats.user[2].syscall(NR.unshare, CLONE.NEWUSER)


def test_a_limit_that_does_not_exist_is_refused() -> None:
    forest = chain([Extent(0, 100_000, 65_536)])
    limited = replace(forest.namespaces[1], limits={"../kernel/hostname": 0})
    with making(Forest([forest.namespaces[0], limited])) as keepers:
        with pytest.raises(RebuildError, match="no limit"):
            keepers.set_limits()


def test_an_ancestor_without_a_process_is_part_of_the_forest() -> None:
    forest = chain([Extent(0, 100_000, 65_536)], [Extent(0, 1000, 100)], [Extent(7, 5, 3)])
    with making(forest) as keepers:
        lowest = user_pids(keepers)[3]
        for index in (1, 2):
            keepers.seats.user[index].kill_and_reap()
        live = LiveForest()
        live.learn_members([lowest])
        fd = nsfs.open_namespace(lowest, "user")
        try:
            assert live.number_of(fd) == 3
        finally:
            os.close(fd)
        assert live.forest().namespaces == forest.namespaces


def test_a_map_too_long_for_one_write_is_refused() -> None:
    far = 4_000_000_000
    forest = chain([Extent(far + 2 * n, far + 2 * n, 1) for n in range(300)])
    with pytest.raises(RebuildError, match=r"user namespace 1: .* bytes of map"), making(forest):
        pass


def test_a_map_outside_of_the_parent_is_refused() -> None:
    forest = chain([Extent(0, 100_000, 10)], [Extent(0, 5, 6)])
    with pytest.raises(RebuildError, match=r"user namespace 2: .*map `0 5 6`"), making(forest):
        pass


def test_setgroups_that_is_denied_here_but_was_allowed_is_refused() -> None:
    forest = chain([Extent(0, 100_000, 10)], [Extent(0, 5, 1)], setgroups="deny")
    allowed = replace(forest.namespaces[2], setgroups="allow")
    forest = Forest([forest.namespaces[0], forest.namespaces[1], allowed])
    with pytest.raises(RebuildError, match="setgroups"), making(forest):
        pass
