"""The steps by which a tree grows again, as `pipeline.image.plan` finds them and `pipeline.stages.growth` plays them.

All pids are level-0 pids.
"""

from __future__ import annotations

from msgspec import Struct


class Spawn(Struct, frozen=True):
    """Puppet `creator` clones process `pid`. All pids are level-0 pids.

    Args:
        pid: the new process.
        creator: which puppet clones it; 0 is the launcher.
        sibling: with CLONE_PARENT: the new process gets the creator's parent.
        pidns: a `Namespace` index to be entered for the clone, where it is not the creator's own.
        first: the new process is the first of `pidns`, which begins to exist with it.
        stand_in: not a process of the tree: founds a session or group and ends.
        pids: of a stand-in, per pid namespace level.
        shares: fields of `Together` that the new process shares with its creator.
    """

    pid: int
    creator: int
    sibling: bool = False
    pidns: int | None = None
    first: bool = False
    stand_in: bool = False
    pids: tuple[int, ...] = ()
    shares: tuple[str, ...] = ()


class FoundSession(Struct, frozen=True):
    """`pid` calls setsid."""

    pid: int


class JoinGroup(Struct, frozen=True):
    """`pid` enters process group `pgid` (its own pid: founds it)."""

    pid: int
    pgid: int


class Become(Struct, frozen=True):
    """`pid` joins its namespaces and gets a new address space with all of its mappings."""

    pid: int


class Inherit(Struct, frozen=True):
    """`pid` joins its namespaces, keeps its parent's memory and changes what differs."""

    pid: int


class Share(Struct, frozen=True):
    """`pid` uses its creator's memory."""

    pid: int


class BeginTime(Struct, frozen=True):
    """`pid` makes time namespace `timens`, for the children it bears from now on."""

    pid: int
    timens: int


class LookAhead(Struct, frozen=True):
    """`pid` chooses pid namespace `pidns`, which has its first process, for the children it bears from now on."""

    pid: int
    pidns: int


class Fill(Struct, frozen=True):
    """The pages of `space` come now."""

    space: int


class Remove(Struct, frozen=True):
    """Stand-in `pid` ends."""

    pid: int


Step = Spawn | FoundSession | JoinGroup | Become | Inherit | Share | BeginTime | LookAhead | Fill | Remove
