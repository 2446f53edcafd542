"""Topologies of namespaces by name, as steps of tests/programs/topology.py.

Each is a list of steps of the first process. `user`, `fork` and the others make one step each; `U` and the
like are maps that occur often.
"""

from __future__ import annotations

from typing import Any

Step = list[Any]
Steps = list[Step]


def user(uids: str | None, gids: str | None = "", setgroups: str = "allow") -> Step:
    """A user namespace; without `gids` both maps are the same."""
    return ["user", uids, uids if gids == "" else gids, setgroups]


def around(*args: Any) -> Step:
    """A user namespace in which the process keeps ids that are not mapped there."""
    return ["around", *user(*args)[1:]]


def fork(name: str, *steps: Step) -> Step:
    """A child."""
    return ["fork", name, list(steps)]


def ns(*kinds: str) -> Step:
    """Namespaces of other kinds."""
    return ["ns", list(kinds)]


def enter(name: str, *kinds: str) -> Step:
    """Joining the namespaces of another process."""
    return ["enter", name, list(kinds)]


def ids(uid: int | None, gid: int | None = None, groups: list[int] | None = None) -> Step:
    """Ids, keeping capabilities."""
    return ["ids", uid, gid if gid is not None else uid, groups]


def deep(levels: int, *innermost: Step) -> Steps:
    """One process below `levels` user namespaces, each one id narrower."""
    return [user(f"0 {0 if n == 0 else 1} {1000 - n}") for n in range(levels)] + list(innermost)


def chain(levels: int) -> Step:
    """A process at every level."""
    step = fork(f"level{levels}", user(f"0 1 {1000 - levels}"))
    for level in range(levels - 1, 0, -1):
        step = fork(f"level{level}", user(f"0 1 {1000 - level}"), step)
    return step


WIDE = user("0 100000 65536")
INNER = user("0 1000 100", "0 2000 100")
INNER_FEW = user("0 1 4\n16 6 170", "0 4 185")
ONE = user("1001 1001 1", "1002 1002 1", "deny")
CONTAINER = [WIDE, ns("pid", "uts", "ipc", "cgroup")]
GAPS = "\n".join(f"{10 * n} {100_000 + 20 * n} 5" for n in range(20))
MANY = "\n".join(f"{2 * n} {2 * n} 1" for n in range(340))

CATALOGUE: dict[str, Steps] = {
    # -- depth -------------------------------------------------------------------
    "no namespace": [fork("child")],
    "depth 1": [WIDE],
    "depth 2": [WIDE, INNER],
    "depth 3": deep(3),
    "depth 10": deep(10),
    "depth 32": deep(32),
    "depth 33, the last": deep(33),
    "a process at each of 8 levels": [chain(8)],
    "a process at each of 20 levels": [chain(20)],
    # -- forests -----------------------------------------------------------------
    "two roots": [fork("one", WIDE), fork("two", user("0 200000 65536"))],
    "two roots that share ids": [fork("one", user("0 1000 100")), fork("two", user("5 1050 100"))],
    "30 siblings": [fork(f"s{n}", user(f"0 {100 * n} 100")) for n in range(30)],
    "siblings below a root": [WIDE, fork("one", user("0 10 10")), fork("two", user("0 10 10"))],
    "child deeper than its parent": [fork("child", WIDE, fork("grandchild", INNER))],
    "child higher than its parent": [fork("child"), WIDE],
    "children above and below": [fork("above"), WIDE, fork("beside"), INNER, fork("below")],
    "child two levels higher": [fork("child"), WIDE, INNER],
    "child sideways of its parent": [
        fork("aside", user("0 5000 10")),
        fork("child", fork("grandchild", enter("aside", "user")), user("0 6000 10")),
    ],
    "two processes enter a third's": [
        fork("host", WIDE),
        fork("guest", enter("host", "user")),
        fork("guest2", enter("host", "user"), ids(0), INNER),
    ],
    "grandchild higher than both": [fork("child", fork("grandchild"), WIDE), user("0 200000 1000")],
    "empty namespace as parent": [WIDE, user("0 0 1000"), fork("child")],
    "empty namespaces between": [fork("child", *deep(5)), fork("other", *deep(4))],
    "empty namespace as owner": [fork("child", WIDE, ns("uts"), INNER)],
    # -- maps --------------------------------------------------------------------
    "one id": [ONE, ids(1001, 1002)],
    "one id twice": [ONE, ids(1001, 1002), user("0 1001 1", "0 1002 1", "deny"), ids(0)],
    "map of a container": [WIDE, ids(33, 33, [34, 35])],
    "without 0": [user("5 100005 10", "7 100007 20"), ids(6, 9)],
    "gaps": [user(GAPS), ids(102, 103, [104, 190])],
    "340 lines": [user(MANY), ids(678, 676)],
    "340 lines twice": [user(MANY), user("\n".join(f"{n} {2 * n} 1" for n in range(340))), ids(339)],
    "uids and gids differ": [user("0 1000 10", "0 5000 3"), ids(9, 2)],
    "lines that touch": [user("0 0 1\n1 1 1\n2 2 5"), ids(6)],
    "lines in another order": [user("10 10 5\n0 0 5\n5 5 5"), ids(14)],
    "reversed order of ids": [user("0 9 1\n1 8 1\n2 7 1"), ids(2)],
    "whole range": [user("0 0 4294967295")],
    "the last id": [user("0 4294967294 1")],
    "no map yet": [user(None, None)],
    "no map yet, and another id": [ids(44), around(None, None)],
    "uid map only": [user("0 1000 10", None)],
    "gid map only": [user(None, "0 1000 10")],
    "no map in the second level": [WIDE, user(None, None)],
    "setgroups denied": [user("0 1000 10", "0 1000 10", "deny")],
    "setgroups denied below": [WIDE, user("0 5 5", "0 5 5", "deny"), user("0 1 3")],
    # -- ids ---------------------------------------------------------------------
    "uid without mapping": [ids(44, 45), around("0 1000 10")],
    "uid without mapping at depth 2": [WIDE, ids(44, 45), around("0 1000 10")],
    "uid mapped two levels up only": [user("0 0 60"), ids(44, 45), around("0 1 30")],
    "groups without mapping": [ids(0, 0, [54, 55]), around("0 0 50")],
    "groups without mapping, denied": [ids(0, 0, [54, 55]), around("0 0 50", "0 0 50", "deny")],
    "files of outside ids": [
        ["file", "outside"],
        fork("child", WIDE, ["file", "inside"], ids(7), ["file", "mine"]),
    ],
    # -- capabilities --------------------------------------------------------------
    "no capability": [WIDE, ["drop"]],
    "no capability outside": [fork("child", WIDE), ["drop"]],
    "bounding set": [WIDE, ["bound", 5], ["bound", 21], fork("child", ["bound", 7])],
    "ambient": [WIDE, ids(7), ["ambient", 10]],
    "securebits": [WIDE, ["securebits", 0x2F], fork("child", ["securebits", 0x2F | 0xC0])],
    "no new privileges": [["nnp"], WIDE, fork("child", ["drop"])],
    # -- pid namespaces ------------------------------------------------------------
    "pid namespace": [ns("pid"), fork("init", fork("child"))],
    "two children in a pid namespace": [ns("pid"), fork("init"), fork("second"), fork("third", ["setsid"])],
    "pid namespace of a user namespace": [WIDE, ns("pid"), fork("init", fork("child"))],
    "three pid namespaces": [ns("pid"), fork("a", ns("pid"), fork("b", ns("pid"), fork("c", fork("d"))))],
    "pid and user namespaces in turn": [
        WIDE,
        ns("pid"),
        fork("a", INNER, ns("pid"), fork("b", user("0 5 5"), fork("c"))),
    ],
    "pid namespace of a namespace above": [WIDE, ns("pid"), fork("init", INNER, fork("child"))],
    "pid namespace for children of a namespace above": [
        ns("pid"),
        fork("init", user("0 16353 255"), INNER_FEW, fork("child")),
        user("3 119 13", "1 1 1"),
        fork("late"),
    ],
    "pid namespace for children of two above, and children before": [
        WIDE,
        fork("before"),
        ns("pid"),
        fork("init", ["zombie"]),
        fork("second", user("0 5 5")),
        INNER,
        user("0 5 5"),
        fork("third", ["setsid"]),
    ],
    "pid namespace for children, empty": [WIDE, ns("pid")],
    "own /proc": [WIDE, ns("pid"), fork("init", ns("mnt"), ["proc"], fork("child"))],
    "zombies inside": [WIDE, ns("pid"), fork("init", ["zombie"], fork("child", INNER, ["zombie"]))],
    "zombies of every level": [["zombie"], WIDE, ["zombie"], INNER, ["zombie"], fork("child")],
    "zombies beside": [fork("child", ["zombie"], WIDE, ["zombie"]), ["zombie"]],
    "threads inside": [
        WIDE,
        ns("pid"),
        fork("init", ["thread"], fork("child", INNER, ["thread"], ["thread"])),
    ],
    "sessions and groups": [
        WIDE,
        ns("pid"),
        fork("init", ["setsid"], fork("a", ["setpgid"], fork("b")), fork("c", ["setsid"], fork("d"))),
    ],
    # -- other kinds -----------------------------------------------------------------
    "uts of every level": [
        ns("uts"),
        ["hostname", "a"],
        WIDE,
        fork("b", ns("uts"), ["hostname", "b"], INNER, ns("uts"), ["hostname", "c"]),
    ],
    "uts owned by an ancestor": [WIDE, ns("uts"), ["hostname", "owned"], INNER, fork("child")],
    "ipc owned by an ancestor": [WIDE, ns("ipc"), INNER, fork("child", ns("ipc"))],
    "mount namespace owned by an ancestor": [WIDE, ns("mnt"), INNER, fork("child")],
    "all kinds, each level its own": [
        WIDE,
        ns("uts", "ipc", "mnt", "cgroup"),
        fork("child", INNER, ns("uts", "ipc", "mnt", "cgroup"), fork("grandchild")),
    ],
    "shared by siblings": [
        WIDE,
        fork("a", ns("uts", "ipc"), ["hostname", "shared"]),
        fork("b", enter("a", "uts", "ipc")),
        fork("c", ns("uts")),
    ],
    "time namespace for children": [WIDE, ns("time"), fork("child"), fork("child2", INNER)],
    "time namespace owned by an ancestor": [WIDE, ns("time"), fork("child", INNER, fork("grandchild"))],
    "cgroup namespace": [WIDE, ns("cgroup"), fork("child", INNER)],
    # -- containers --------------------------------------------------------------------
    "container": [
        *CONTAINER,
        fork("init", ns("mnt"), ["proc"], ["hostname", "box"], fork("service", ids(33, 33, [4]))),
    ],
    "container in a container": [
        *CONTAINER,
        fork(
            "init",
            ns("mnt"),
            ["proc"],
            ["hostname", "outer"],
            fork(
                "engine",
                INNER,
                ns("pid", "uts", "ipc", "cgroup"),
                fork("inner", ns("mnt"), ["proc"], ["hostname", "inner"], fork("job")),
            ),
        ),
    ],
    "container of a plain user": [
        ids(1234, 2345),
        user("0 1234 1", "0 2345 1", "deny"),
        ids(0),
        ns("pid", "uts"),
        fork("init", ns("mnt"), ["proc"], fork("child")),
    ],
    "root of its own": [ns("mnt"), ["pivot"], fork("child")],
    "root of its own at depth 2": [WIDE, INNER, ns("mnt"), ["pivot"], fork("child")],
    "container with a root of its own": [
        *CONTAINER,
        fork("init", ns("mnt"), ["pivot"], ["proc"], ["hostname", "box"], fork("service", ids(33, 33, [4]))),
    ],
    "two containers with one map": [
        fork("one", *CONTAINER, fork("init1", fork("a"))),
        fork("two", *CONTAINER, fork("init2", fork("b"))),
    ],
}
