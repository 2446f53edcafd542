"""Ten thousand descriptors, twenty thousand mappings, a sparse mapping of 2 GiB: carried, at a linear cost."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import DEPTH_1
from tests.harness.tree import Tree, dump, restore

pytestmark = pytest.mark.root

Start = Callable[..., Tree]


def cost_s(start: Start, image: Path, *amounts: int) -> tuple[float, float]:
    """Processor time of a dump and of a restore; the tree must be well afterwards."""
    tree = start("large", DEPTH_1, [*map(str, amounts)])
    spent = [_processor_s()]
    dump(tree, image)
    spent.append(_processor_s())
    restore(tree, image)
    spent.append(_processor_s())
    tree.check()
    assert tree.end() == 0
    return spent[1] - spent[0], spent[2] - spent[1]


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("kind", "few", "many"), [("descriptors", 1000, 10_000), ("mappings", 3000, 20_000)])
def test_cost_stays_linear(start: Start, tmp_path: Path, kind: str, few: int, many: int) -> None:
    """Five times the cost for each is allowed: other work on the machine makes everything dearer."""

    def cost(number: int, turn: int = 0) -> tuple[float, float]:
        amounts = (number, 1) if kind == "descriptors" else (10, number)
        return cost_s(start, tmp_path / f"image{number}.{turn}", *amounts, 0, 1)

    def least_of_some(number: int) -> list[float]:
        """What is small is measured several times: other work on the machine only adds to it."""
        return [min(times) for times in zip(*(cost(number, turn) for turn in range(3)), strict=True)]

    nothing, some, all_of_them = least_of_some(10), least_of_some(few), cost(many)
    for what, least, less, more in zip(("dump", "restore"), nothing, some, all_of_them, strict=True):
        # the start of the interpreter varies by more than a thousand mappings cost
        each, of_many = (less - least + 0.05) / few, (more - least) / many
        print(f"{what}: {1e3 * each:.3f} ms for each of {few} {kind}, {1e3 * of_many:.3f} ms of {many}")
        assert of_many < 5 * each, (  # ten times, if it grew with the square
            f"{what}: {1e3 * of_many:.3f} ms for each of {many}, {1e3 * each:.3f} of {few}"
        )


def test_a_sparse_mapping_costs_what_is_used_of_it(start: Start, tmp_path: Path) -> None:
    def least_s(mib: int) -> list[float]:
        """Other work on the machine only adds to it."""
        times = (cost_s(start, tmp_path / f"image{mib}.{turn}", 10, 1, mib, 1) for turn in range(3))
        return [min(found) for found in zip(*times, strict=True)]

    small, large = least_s(16), least_s(2048)
    for what, least, more in zip(("dump", "restore"), small, large, strict=True):
        assert more < least + 0.2, (
            f"{what}: {more:.2f} s of processor time for 2 GiB, {least:.2f} s for 16 MiB"
        )
    sizes = [(tmp_path / f"image{mib}.0" / "image").stat().st_size for mib in (16, 2048)]
    assert sizes[1] < sizes[0] + (1 << 20)
