"""When the rounds of a live migration end."""

from __future__ import annotations

import pytest

from pipeline.stages.pacing import Pacing, Verdict

MIB = 1 << 20
#: a link of 100 MiB/s
RATE = 100.0 * MIB


def verdicts(pacing: Pacing, *left_mib: float) -> list[Verdict]:
    return [pacing.judge(int(left * MIB), RATE) for left in left_mib]


def test_rounds_go_on_while_less_is_left_each_time() -> None:
    pacing = Pacing(max_downtime_s=1.0, max_rounds=30, fixed_s=0.0)
    assert verdicts(pacing, 80, 40, 20, 10, 9) == ["again"] * 4 + ["switch"]


def test_so_little_that_it_does_not_count_is_the_end() -> None:
    assert verdicts(Pacing(1.0, 30, 0.0), 0.25) == ["switch"]


def test_what_stays_too_much_is_given_up_after_a_while() -> None:
    pacing = Pacing(max_downtime_s=0.3, max_rounds=30, fixed_s=0.0)
    assert verdicts(pacing, 100, 100, 99, 101) == ["again", "again", "again", "too long"]


def test_a_round_that_brings_something_gives_patience_again() -> None:
    pacing = Pacing(max_downtime_s=0.3, max_rounds=30, fixed_s=0.0)
    assert verdicts(pacing, 100, 100, 60, 60, 60, 60) == ["again"] * 5 + ["too long"]


@pytest.mark.parametrize(("left_mib", "expected"), [(20, "switch"), (50, "too long")])
def test_there_are_not_more_rounds_than_allowed(left_mib: int, expected: Verdict) -> None:
    pacing = Pacing(max_downtime_s=0.3, max_rounds=2, fixed_s=0.0)
    assert verdicts(pacing, 100, left_mib) == ["again", expected]


def test_what_takes_its_time_whatever_is_left_counts() -> None:
    pacing = Pacing(max_downtime_s=0.3, max_rounds=1, fixed_s=0.25)
    assert pacing.expected_s(10 * MIB, RATE) == pytest.approx(0.35)
    assert verdicts(pacing, 10) == ["too long"]


def test_without_a_rate_only_the_fixed_part_is_known() -> None:
    assert Pacing(0.3, 30, 0.1).expected_s(MIB, 0.0) == 0.1
