"""``python -m tests``: what is run side by side, and what as it is."""

from __future__ import annotations

import pytest

from tests.__main__ import as_it_is


@pytest.mark.parametrize(
    "words",
    [
        "-s",
        "-xvs",
        "--capture=no",
        "--pdb",
        "-n2",
        "-n 2",
        "--dist no",
        "-p no:xdist",
        "-pno:xdist",
        "--co",
        "--help",
    ],
)
def test_as_it_is(words: str) -> None:
    assert as_it_is(["tests/image", *words.split()])


@pytest.mark.parametrize(
    "words",
    ["", "-q -x", "-vx", "-rs", "-k capture", "-m root", "-p no:cacheprovider", "--maxfail=1", "--lf"],
)
def test_side_by_side(words: str) -> None:
    assert not as_it_is(["tests/image", *words.split()])
