"""Who is in which namespace: levels of pid namespaces, owners, what is shared with the pipeline."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel.syscalls import CLONE, PRCTL, mount, prctl, unshare
from pipeline.resources.namespaces.members import KINDS
from tests.userns.making import captured, held, made_again, own_namespace

pytestmark = pytest.mark.root


def children(pid: int) -> list[HostPid]:
    return [HostPid(int(p)) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def with_child(act: Callable[[], None], below: Callable[[], None]) -> Callable[[], None]:
    """Run `act`, then `below` in a child that waits and ends with its parent."""

    def whole() -> None:
        act()
        reader, writer = os.pipe()
        if os.fork() == 0:
            prctl(PRCTL.SET_PDEATHSIG, signal.SIGKILL)
            below()
            os.write(writer, b"x")
            while True:
                signal.pause()
        assert os.read(reader, 1) == b"x"

    return whole


def nothing() -> None:
    """Stay."""


def test_a_process_in_our_own_namespaces_is_in_external_ones_only() -> None:
    with held(nothing) as pid:
        capture, forest = captured(pid)
        members = capture.memberships[pid]
        assert members.user == 0
        assert [capture.namespaces[getattr(members, kind)].kind for kind in KINDS] == list(KINDS)
        assert all(namespace.external for namespace in capture.namespaces)
        assert list(forest.namespaces) == [0]


def test_levels_of_pid_namespaces_and_what_waits_for_children() -> None:
    def level() -> None:
        unshare(CLONE.NEWPID)

    with held(with_child(level, with_child(level, nothing))) as top:
        (middle,) = children(top)
        (low,) = children(middle)
        capture, _ = captured(top, middle, low)
        assert not capture.blockers
        one, two, three = (capture.memberships[pid] for pid in (top, middle, low))
        assert one.pid == capture.external("pid")
        assert one.pid_for_children == two.pid
        assert two.pid_for_children == three.pid == three.pid_for_children
        assert [capture.namespaces[n].parent for n in (two.pid, three.pid)] == [one.pid, two.pid]


def test_pid_namespaces_between_are_part_of_the_image() -> None:
    def level() -> None:
        unshare(CLONE.NEWPID)

    with held(with_child(level, with_child(level, nothing))) as top:
        (middle,) = children(top)
        (low,) = children(middle)
        capture, _ = captured(low)
        assert len([n for n in capture.namespaces if n.kind == "pid"]) == 3


def test_owners_are_part_of_the_forest_though_nobody_is_in_them() -> None:
    def inner() -> None:
        unshare(CLONE.NEWUTS)
        unshare(CLONE.NEWUSER)

    with held(inner, "0 100000 65536") as pid:
        capture, forest = captured(pid)
        assert not capture.blockers
        members = capture.memberships[pid]
        uts = own_namespace(capture, "uts")
        assert forest.namespaces[members.user].parent == uts.owner != 0
        assert not forest.namespaces[members.user].uid_map
    with held(inner, "0 100000 65536") as pid, made_again(pid, "uts") as (record, again):
        assert own_namespace(captured(again)[0], "uts").owner == record.owner


def test_namespaces_are_shared_as_they_were() -> None:
    def apart() -> None:
        unshare(CLONE.NEWUTS | CLONE.NEWIPC)

    with held(with_child(apart, lambda: unshare(CLONE.NEWUTS))) as top:
        (low,) = children(top)
        capture, _ = captured(top, low)
        one, two = capture.memberships[top], capture.memberships[low]
        assert one.ipc == two.ipc != capture.external("ipc")
        assert len({one.uts, two.uts, capture.external("uts")}) == 3


def test_proc_of_the_own_pid_namespace_waits_for_its_first_process(tmp_path: Path) -> None:
    def container() -> None:
        unshare(CLONE.NEWPID | CLONE.NEWNS)
        mount(None, b"/", None, 0x44000)

    def first() -> None:
        mount(b"proc", b"/proc", b"proc", 2 | 4 | 8, b"hidepid=2")

    with held(with_child(container, first)) as top:
        (low,) = children(top)
        capture, _ = captured(top, low)
        assert not capture.blockers
        (step,) = own_namespace(capture, "mnt").state["steps"]
        assert step[1] == b"/proc"
        assert step[5] == b"hidepid=invisible"
        assert step[6] == capture.memberships[low].pid


def test_a_pid_namespace_between_whose_first_process_is_not_of_the_tree_is_named() -> None:
    """Nobody of the tree lives in it, but it has to be made again for the one inside."""

    def another() -> None:
        unshare(CLONE.NEWPID)

    with held(with_child(another, with_child(another, lambda: None))) as pid:
        (middle,) = children(pid)
        (inner,) = children(middle)
        (blocker,) = captured(inner)[0].blockers
        assert f"pid {inner}: is in a pid namespace whose first process is not part of the tree" in str(
            blocker
        )
        assert f"--pid {middle}" in str(blocker)
        assert not captured(middle, inner)[0].blockers
