"""A thousand threads, five hundred processes: carried, at a cost for each that does not grow with their number."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import DEPTH_1, Setting
from tests.harness.tree import Tree, dump, restore

pytestmark = pytest.mark.root

Start = Callable[..., Tree]
SMALL_ONES = 3  # how often what is small is measured


def cost_s(start: Start, image: Path, threads: int, processes: int, setting: Setting) -> tuple[float, float]:
    """Processor time of a dump and of a restore; the tree must be well afterwards."""
    tree = start("crowd", setting, [str(threads), str(processes)])
    spent = [_processor_s()]
    dump(tree, image)
    spent.append(_processor_s())
    restore(tree, image)
    spent.append(_processor_s())
    assert len(tree.pids()) == processes + 1
    tree.check()
    assert tree.end() == 0
    return spent[1] - spent[0], spent[2] - spent[1]


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("kind", "few", "many"), [("threads", 150, 1000), ("processes", 80, 500)])
def test_cost_stays_linear(start: Start, tmp_path: Path, kind: str, few: int, many: int) -> None:
    """Five times the cost for each is allowed, for other work on the machine; what is quadratic costs six times.

    What few of them cost is little beside a command that does nothing, and other
    work makes either dearer, never cheaper: the least of several times is compared.
    """
    images = itertools.count()

    def cost(number: int) -> tuple[float, float]:
        numbers = (number, 1) if kind == "threads" else (1, number)
        return cost_s(start, tmp_path / f"image{next(images)}", *numbers, DEPTH_1)

    def least_cost(number: int) -> tuple[float, float]:
        dumps, restores = zip(*(cost(number) for _ in range(SMALL_ONES)), strict=True)
        return min(dumps), min(restores)

    nothing, some, all_of_them = least_cost(1), least_cost(few), cost(many)
    for what, least, less, more in zip(("dump", "restore"), nothing, some, all_of_them, strict=True):
        each, of_many = (less - least) / few, (more - least) / many
        print(f"{what}: {1e3 * each:.2f} ms for each of {few} {kind}, {1e3 * of_many:.2f} ms of {many}")
        assert of_many < 5 * each, (  # six times and more, if it grew with the square
            f"{what}: {1e3 * of_many:.2f} ms for each of {many}, {1e3 * each:.2f} of {few}"
        )
