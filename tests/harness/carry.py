"""One round: a tree is dumped, gone, restored, and must be what it was, in /proc and from inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import snapshot
from tests.harness.tree import Tree, dump, restore

_SHOWN = 40


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    """Nothing that /proc says differs."""
    differences = snapshot.compare(before, after)
    assert not differences, "\n".join([f"/proc differs in {len(differences)} places:", *differences[:_SHOWN]])


@contextmanager
def unharmed(tree: Tree) -> Iterator[None]:
    """The body leaves `tree` running as it was. Its own checks come last: they change what they look at."""
    before = snapshot.take(tree.pids())
    yield
    assert_same(before, snapshot.take(tree.pids()))
    tree.check()


def carry(tree: Tree, image: Path, *options: str) -> None:
    """Dump `tree` into `image`, with these options, and restore it."""
    with unharmed(tree):
        dump(tree, image, *options)
        restore(tree, image)
