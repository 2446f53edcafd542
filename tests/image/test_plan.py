"""The plan of growth: every birth possible, in an order the kernel accepts."""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.image.plan import Planner, fill_order, plan
from pipeline.image.schema import (
    AddressSpace,
    Extent,
    Memberships,
    Namespace,
    Process,
    UserNamespace,
)
from pipeline.image.steps import Become, Fill, FoundSession, Inherit, JoinGroup, LookAhead, Remove, Spawn

USER = [
    UserNamespace(index=0),
    UserNamespace(index=1, parent=0, uid_map=[Extent(0, 100000, 65536)]),
    UserNamespace(index=2, parent=1, uid_map=[Extent(0, 1000, 10)]),
]
PID = [
    Namespace(index=0, kind="pid", external=True),
    Namespace(index=1, kind="pid", external=False, owner=1, parent=0),
]


def process(
    pids: list[int],
    parent: int = 0,
    sid: int = 10,
    pgid: int = 10,
    user: int = 0,
    pid: int = 0,
    state: str = "running",
    space: int | None = None,
) -> Process:
    members = Memberships(
        user=user,
        pid=pid,
        pid_for_children=pid,
        mnt=0,
        uts=0,
        ipc=0,
        net=0,
        cgroup=0,
        time=0,
        time_for_children=0,
    )
    return Process(
        pids=pids, parent=parent, sid=sid, pgid=pgid, namespaces=members, space=space,
        state="zombie" if state == "zombie" else "running",
    )  # fmt: skip


def forking_into_1(process: Process) -> Process:
    """`process`, whose children are born into pid namespace 1."""
    return replace(process, namespaces=replace(process.namespaces, pid_for_children=1))


def planned(*processes: Process, spaces: list[AddressSpace] | None = None) -> Planner:
    return plan(processes, spaces or [], PID, USER)


def test_root_founds_its_session_before_its_children_are_born() -> None:
    steps = planned(process([10]), process([11], 10)).steps
    assert steps == [Spawn(10, 0), FoundSession(10), Become(10), Spawn(11, 10), Become(11)]


def test_child_of_an_older_session_is_born_before_setsid() -> None:
    steps = planned(process([10]), process([11], 10, sid=11, pgid=11), process([12], 11, sid=10)).steps
    assert steps.index(Spawn(12, 11)) < steps.index(FoundSession(11))


def test_child_outside_its_parents_user_namespace_is_born_before_the_parent_moves() -> None:
    steps = planned(process([10], user=1), process([11], 10, user=0), process([12], 10, user=2)).steps
    assert steps.index(Spawn(11, 10)) < steps.index(Become(10)) < steps.index(Spawn(12, 10))


def test_dead_session_leader_gets_a_stand_in() -> None:
    steps = planned(process([10]), process([11], 10, sid=9, pgid=9)).steps
    assert Spawn(9, 10, stand_in=True, pids=(9,)) in steps
    assert Spawn(11, 9, sibling=True) in steps
    assert Remove(9) in steps


def test_dead_group_leader_gets_a_stand_in_in_the_same_session() -> None:
    steps = planned(process([10]), process([11], 10, pgid=9), process([12], 10, pgid=9)).steps
    assert steps[-4:] == [JoinGroup(9, 9), JoinGroup(11, 9), JoinGroup(12, 9), Remove(9)]


def test_sibling_leads_the_session() -> None:
    steps = planned(
        process([10]), process([11], 10, sid=11, pgid=11), process([12], 10, sid=11, pgid=11)
    ).steps
    assert Spawn(12, 11, sibling=True) in steps


def test_first_of_a_pid_namespace() -> None:
    steps = planned(
        process([10]), process([11, 1], 10, user=1, pid=1), process([12, 2], 11, user=1, pid=1)
    ).steps
    assert Spawn(11, 10, pidns=1, first=True) in steps
    assert Spawn(12, 11) in steps


def test_entered_pid_namespace() -> None:
    steps = planned(
        process([10]), process([11, 1], 10, user=1, pid=1), process([12, 2], 10, user=1, pid=1)
    ).steps
    assert Spawn(12, 10, pidns=1) in steps


def test_children_go_to_a_namespace_of_further_out_that_was_chosen_before_the_parent_moved() -> None:
    root = forking_into_1(process([10], user=2))
    init = process([11, 1], 10, user=1, pid=1)
    steps = planned(root, process([9], 10, user=2), init, process([12, 2], 10, user=2, pid=1)).steps
    order = [
        Spawn(9, 10),  # in the own pid namespace: from now on nobody is born into that
        Spawn(11, 10, pidns=1, first=True),
        LookAhead(10, 1),
        Become(10),
        Spawn(12, 10, pidns=1),
    ]
    assert [step for step in steps if step in order] == order


def test_a_namespace_of_further_out_that_has_not_begun_yet_is_refused() -> None:
    (blocker,) = planned(forking_into_1(process([10], user=2)), process([11, 1], 10, user=2, pid=1)).blockers
    assert "moved before that had its first process" in str(blocker)


def test_a_dead_leader_among_children_of_another_pid_namespace_is_refused() -> None:
    ahead = forking_into_1(process([11], 10, user=2))
    init = process([12, 1], 11, user=1, pid=1)
    found = planned(process([10]), ahead, init, process([14, 2], 11, sid=13, pgid=13, user=2, pid=1)).blockers
    assert any("children of it are in session 13" in str(blocker) for blocker in found)


def test_session_that_cannot_be_inherited_is_refused() -> None:
    leader = process([11], 10, sid=11, pgid=11)
    planner = planned(process([10]), leader, process([12], 10), process([13], 12, sid=11))
    assert any("session" in blocker.reason for blocker in planner.blockers)


def test_inherited_memory_comes_after_the_parents_pages() -> None:
    def space(number: int, copy_of: int | None) -> AddressSpace:
        return AddressSpace(space=number, vmas=[], exe=0, layout=[0] * 11, auxv=b"", copy_of=copy_of)

    planner = planned(
        process([10], space=1), process([11], 10, space=2), spaces=[space(1, None), space(2, 1)]
    )
    steps = planner.steps
    assert steps.index(Fill(1)) < steps.index(Spawn(11, 10)) < steps.index(Inherit(11)) < steps.index(Fill(2))
    assert list(fill_order(steps)) == [1, 2]


def test_zombies_are_born_last_and_never_become() -> None:
    steps = planned(process([10]), process([11], 10, state="zombie"), process([12], 10)).steps
    assert steps.index(Spawn(12, 10)) < steps.index(Spawn(11, 10))
    assert Become(11) not in steps
