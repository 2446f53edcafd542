"""Random topologies: made for real, dumped, restored, and compared from inside and outside.

A few in every run, always the same ones; with PIPELINE_LONG=1 a few hundred new ones.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.image.schema import Extent
from tests.harness.carry import carry
from tests.harness.settings import DEPTH_0
from tests.harness.tree import Tree, Workshop
from tests.topologies.catalogue import Step, Steps, enter, fork, ids, ns, user
from tests.userns.forests import OUTSIDE, extents

pytestmark = pytest.mark.root

LONG = bool(os.environ.get("PIPELINE_LONG"))
MOST_PROCESSES = 7
Lines = tuple[Extent, ...]
Ends = tuple[Steps, Lines, Lines]


def text(lines: list[Extent]) -> str:
    return "\n".join(f"{line.inner} {line.lower} {line.count}" for line in lines)


@st.composite
def topologies(draw: st.DrawFn) -> Steps:
    """Steps of the first process; every process below it has a few of its own."""
    names = iter(f"p{number}" for number in range(MOST_PROCESSES))

    def steps(uids: Lines, gids: Lines, depth: int, siblings: dict[str, tuple[Lines, Lines]]) -> Ends:
        """What a process does, and the maps of the user namespace that it ends in.

        `siblings`: those that were forked from where it begins, with the maps that they ended in.
        """
        found: Steps = []
        children: dict[str, tuple[Lines, Lines]] = {}
        waits = False  # a pid namespace that waits for its first process
        if siblings and draw(st.booleans()):
            name = draw(st.sampled_from(sorted(siblings)))
            uids, gids = siblings[name]
            found += [enter(name, "user"), ids(draw(one_of(uids)), draw(one_of(gids)))]
        for _ in range(draw(st.integers(0 if depth else 2, 4))):
            what = draw(
                st.sampled_from(
                    ["user", "user", "fork", "fork", "fork", "ns", "ids", "drop groups", "zombie"]
                )
            )
            if what == "user" and not waits:  # the helper that writes the maps would be its first process
                inner_uids, inner_gids = (draw(extents(some, 4)) for some in (uids, gids))
                found.append(user(text(inner_uids), text(inner_gids)))
                uids, gids = tuple(inner_uids), tuple(inner_gids)
                children.clear()
            elif what == "fork" and depth < 4:
                name = next(names, "")
                if name:
                    # a process knows others by numbers of the outermost pid namespace, and nobody enters where they are
                    inner, *ends = steps(uids, gids, depth + 1, {} if waits else children)
                    found.append(fork(name, *inner))
                    moved = any(step[0] in {"user", "enter"} for step in inner)
                    if moved and not waits and ["ns", ["pid"]] not in inner:
                        children[name] = ends[0], ends[1]
                    waits = False
            elif what == "ns":
                kinds = draw(
                    st.sampled_from([("uts",), ("ipc",), ("uts", "cgroup"), ("mnt",), ("pid",), ("net",)])
                )
                if kinds != ("pid",) or not waits:
                    found.append(ns(*kinds))
                    waits = waits or kinds == ("pid",)
                    if kinds == ("pid",):
                        children.clear()
            elif what == "ids":
                found.append(ids(draw(one_of(uids)), draw(one_of(gids))))
            elif what == "drop groups":
                found.append(groups(draw(st.lists(one_of(gids), max_size=3))))
            elif what == "zombie" and not waits:
                found.append(["zombie"])
        # at last: who has threads may not move, and who forks into another pid namespace may have none
        if ["ns", ["pid"]] not in found and draw(st.booleans()):
            found.append(["thread"])
        return found, uids, gids

    return steps(OUTSIDE, OUTSIDE, 0, {})[0]


def one_of(lines: tuple[Extent, ...]) -> st.SearchStrategy[int]:
    """An id that is mapped."""
    return st.sampled_from(lines).flatmap(
        lambda line: st.integers(line.inner, line.inner + min(line.count, 5000) - 1)
    )


def groups(numbers: list[int]) -> Step:
    return ["ids", None, None, numbers]


@pytest.mark.timeout(3600 if LONG else 600)
@pytest.mark.skipif(os.geteuid() != 0, reason="makes user namespaces with any map: needs root")
@settings(
    max_examples=300 if LONG else 30,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # each example is a second: a shorter one is found by hand
)
@given(steps=topologies())
def test_random_topology_is_carried(workshop: Workshop, steps: Steps) -> None:
    with tempfile.TemporaryDirectory() as place:
        tree = Tree.start(workshop, "topology", DEPTH_0, [json.dumps(steps)])
        try:
            carry(tree, Path(place) / "image")
            assert tree.end() == 0
        finally:
            tree.kill()
