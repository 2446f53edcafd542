"""Whether the networks of an image can be made here: asked before anything is made.

`pipeline.resources.namespaces.network` makes them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import msgspec

from pipeline.errors import Blocker, ImageError
from pipeline.ids import LocalFd
from pipeline.image.schema import Namespace
from pipeline.kernel.rtnetlink import attributes
from pipeline.resources.namespaces import nftables, outside_links
from pipeline.resources.namespaces.network import FRA_UID_RANGE, PING_GROUPS, NetState
from pipeline.resources.namespaces.tun import Number
from pipeline.userns.externals import GivenDevice
from pipeline.userns.forest import IdKind

_UID: IdKind = "uid"
_GID: IdKind = "gid"


def states_of(namespaces: Iterable[Namespace]) -> dict[int, NetState]:
    """What the image says of each of the tree's networks, by `Namespace` index.

    Raises:
        ImageError: it says something else.
    """
    try:
        return {
            n.index: msgspec.convert(n.state, NetState)
            for n in namespaces
            if n.kind == "net" and not n.external
        }
    except msgspec.ValidationError as error:
        raise ImageError(f"a network namespace: {error}") from error


def check_here(
    namespaces: Mapping[int, Namespace],
    number: Number,
    ids_stay: bool,
    given: Sequence[GivenDevice],
    surroundings: LocalFd,
) -> Iterator[Blocker]:
    """Everything that these networks need and that is not here.

    Args:
        namespaces: of the image.
        number: what an id is called here.
        ids_stay: the ids of the surroundings have the numbers here that they had; those of the tree's own always do.
        given: what devices of the tree shall hang on.
        surroundings: the network outside of the tree; stays the caller's.
    """
    states = states_of(namespaces.values())
    yield from outside_links.check_here(states, given, surroundings)
    for index, state in states.items():
        yield from _unplaced_users(index, state, number)
        stay = ids_stay or namespaces[index].owner != 0
        yield from nftables.check_here(index, state.ruleset, stay)
        if not stay and PING_GROUPS in state.sysctls:
            yield Blocker(
                f"network namespace {index}",
                f"lets groups make ping sockets ({PING_GROUPS}), and --map gives these other numbers here",
                "restore with --map same",
            )
        if not stay and any(FRA_UID_RANGE in attributes(rule[12:]) for rule in state.rules):
            yield Blocker(
                f"network namespace {index}",
                "has routing rules for uids, and --map gives these other numbers here",
                "restore with --map same",
            )


def _unplaced_users(index: int, state: NetState, number: Number) -> Iterator[Blocker]:
    for link in state.links:
        for wanted, kind in ((link.uid, _UID), (link.gid, _GID)):
            if wanted is not None and number(wanted, kind) is None:
                yield Blocker(
                    f"network namespace {index}",
                    f"its device {os.fsdecode(link.name)} is for {kind} {wanted.id} of user namespace {wanted.ns}, "
                    "who has no place here",
                    "restore with --map auto or --map BASE:COUNT, or as root",
                )
