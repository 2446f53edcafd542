"""Axes with round numbers, and rates that are drawn with fewer columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import svg


@pytest.mark.parametrize(
    ("top", "marks"),
    [
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (4.47, [0, 1, 2, 3, 4]),
        (7, [0, 2, 4, 6]),
        (419, [0, 100, 200, 300, 400]),
        (137_789_440, [0, 50e6, 100e6]),
    ],
)
def test_marks_of_an_axis_are_round(top: float, marks: list[float]) -> None:
    assert svg.ticks(top) == pytest.approx(marks)


@given(st.floats(1e-6, 1e18), st.integers(3, 8))
def test_an_axis_has_a_few_marks_and_none_behind_its_end(top: float, most: int) -> None:
    marks = svg.ticks(top, most)
    assert 2 <= len(marks) <= most + 1
    assert marks[0] == 0
    assert marks[-1] <= top * (1 + 1e-6)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10), st.floats(0, 1e9)), max_size=60),
    st.integers(1, 20),
)
def test_thinned_rates_hold_as_much(parts: list[tuple[float, float, float]], most: int) -> None:
    spans, at = [], 0.0
    for gap, lasts, rate in parts:
        spans.append(svg.Span(at + gap, at + gap + lasts, rate))
        at += gap + lasts
    thin = svg.thinned(spans, most)
    assert len(thin) <= most
    # what lasts no time has no width
    if all(span.end - span.begin > 1e-3 for span in spans):
        held = sum(span.rate * (span.end - span.begin) for span in spans)
        assert sum(span.rate * (span.end - span.begin) for span in thin) == pytest.approx(held)
