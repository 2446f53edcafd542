"""Where a program runs: how deep in user namespaces, with which maps, in which other namespaces."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

CLONE_NEWNS = 0x0002_0000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWUSER = 0x1000_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000


@dataclass(frozen=True, slots=True)
class Level:
    """One user namespace: map lines relative to its parent, and the ids (inside) its process takes."""

    uid_map: tuple[str, ...] = ("0 100000 65536",)
    gid_map: tuple[str, ...] = ("0 100000 65536",)
    setgroups: str = "allow"
    uid: int = 0
    gid: int = 0


FIRST = Level()
SECOND = Level(("0 1000 100",), ("0 2000 100",))
ONE_ID = Level(("0 0 1",), ("0 0 1",), "deny")


@dataclass(frozen=True, slots=True)
class Setting:
    """User namespaces from the outside in, other namespaces (CLONE_NEW* bits) of the innermost one.

    With `chain` one waiting process stays at every level. With `host_ids` (uid, gid on the host)
    all of it is done by a plain user, who may map one id and must deny setgroups(2).
    """

    name: str
    levels: tuple[Level, ...] = ()
    kinds: int = 0
    chain: bool = False
    host_ids: tuple[int, int] | None = None

    @property
    def depth(self) -> int:
        return len(self.levels)

    def to_json(self) -> str:
        return json.dumps(
            {
                "levels": [[x.uid_map, x.gid_map, x.setgroups, (x.uid, x.gid)] for x in self.levels],
                "kinds": self.kinds,
                "chain": self.chain,
                "host_ids": self.host_ids,
            }
        )

    def with_kinds(self, name: str, kinds: int) -> Setting:
        return replace(self, name=name, kinds=kinds)


CONTAINER = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC
DEPTH_0 = Setting("depth0")
DEPTH_1 = Setting("depth1", (FIRST,))
DEPTH_2 = Setting("depth2", (FIRST, SECOND))
DEPTHS = (DEPTH_0, DEPTH_1, DEPTH_2)
CONTAINER_2 = DEPTH_2.with_kinds("container2", CONTAINER)

#: `unshare -c` of root, of a plain user, and of a plain user twice
MAPS = (
    Setting("one-id", (ONE_ID,)),
    Setting(
        "plain-user", (Level(("1234 1234 1",), ("2345 2345 1",), "deny", 1234, 2345),), host_ids=(1234, 2345)
    ),
    Setting(
        "plain-user-twice",
        (
            Level(("0 1234 1",), ("0 2345 1",), "deny"),
            Level(("1234 0 1",), ("2345 0 1",), "deny", 1234, 2345),
        ),
        host_ids=(1234, 2345),
    ),
    Setting("without-0", (Level(("5 100005 10",), ("7 100007 20",), "allow", 6, 9),)),
    Setting(
        "extents",
        (
            Level(
                ("0 100000 10", "10 200000 90", "100 500000 65000"),
                ("0 300000 1", "1 100000 999", "65534 400000 1"),
                "allow",
                12,
                500,
            ),
        ),
    ),
    # groups of the host that nobody could drop are unmapped inside
    Setting("denied", (Level(setgroups="deny"), Level(("0 1000 100",), ("0 2000 100",), "deny"))),
    Setting("chain", (FIRST, SECOND, Level(("7 3 5",), ("8 4 5",), "deny", 8, 9)), chain=True),
    Setting("chain-in-container", (FIRST, SECOND), CONTAINER, chain=True),
)
