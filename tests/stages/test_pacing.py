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


def test_what_goes_whole_in_the_end_counts() -> None:
    pacing = Pacing(max_downtime_s=0.3, max_rounds=1, fixed_s=0.0, untracked_bytes=MIB)
    assert pacing.expected_s(MIB, MIB) == 2.0
    assert pacing.judge(0, MIB) == "too long"


@pytest.mark.parametrize(("fixed_s", "expected"), [(0.19, "again"), (0.21, "switch"), (0.31, "too long")])
def test_what_is_little_beside_what_stands_still_anyway_is_the_end(fixed_s: float, expected: Verdict) -> None:
    assert verdicts(Pacing(0.3, 30, fixed_s, auto_converge=True), 1) == [expected]


def test_what_is_not_known_is_not_little() -> None:
    assert Pacing(1.0, 30, 0.2).judge(MIB, RATE, MIB) == "again"
    assert Pacing(1.0, 30, 0.2).judge(MIB, 0.0) == "again"


def test_without_a_rate_only_the_fixed_part_is_known() -> None:
    assert Pacing(0.3, 30, 0.1).expected_s(MIB, 0.0) == 0.1


def throttles(pacing: Pacing, *left_mib: float) -> list[int]:
    found = []
    for left in left_mib:
        assert pacing.judge(int(left * MIB), RATE) == "again"
        found.append(pacing.throttle_percentage)
    return found


def test_nobody_is_held_back_who_was_not_to_be() -> None:
    pacing = Pacing(max_downtime_s=0.3, max_rounds=30, fixed_s=0.0)
    assert throttles(pacing, 100, 100, 100) == [0, 0, 0]


def test_who_outruns_the_link_is_held_back_more_with_each_round_in_vain() -> None:
    pacing = Pacing(0.3, 30, 0.0, auto_converge=True)
    assert throttles(pacing, *[100] * 13) == [0, 0, 20, 30, 40, 50, 60, 70, 80, 90, 99, 99, 99]
    assert pacing.judge(100 * MIB, RATE) == "too long"


def test_a_round_that_brings_something_holds_nobody_back_more() -> None:
    pacing = Pacing(0.3, 30, 0.0, auto_converge=True)
    assert throttles(pacing, 100, 100, 100, 70, 50, 50, 39) == [0, 0, 20, 20, 20, 30, 30]


def test_what_is_short_enough_holds_nobody_back() -> None:
    pacing = Pacing(0.3, 30, 0.0, auto_converge=True)
    assert verdicts(pacing, 20, 20) == ["again", "switch"]
    assert pacing.throttle_percentage == 0


def test_holding_back_gets_no_more_rounds_than_allowed() -> None:
    pacing = Pacing(0.3, 5, 0.0, auto_converge=True)
    assert verdicts(pacing, *[100] * 5) == ["again"] * 4 + ["too long"]


def test_where_next_to_nothing_is_left_holding_back_would_not_help() -> None:
    pacing = Pacing(0.3, 30, fixed_s=0.4, auto_converge=True)
    assert pacing.judge(int(0.25 * MIB), RATE) == "too long"
    assert pacing.throttle_percentage == 0


def test_another_draft_goes_on_as_slow_as_the_one_before() -> None:
    pacing = Pacing(0.3, 30, 0.0, auto_converge=True, throttle_percentage=60)
    assert throttles(pacing, 100, 100, 50) == [60, 70, 70]


def test_what_only_the_next_round_can_tell_takes_a_next_round() -> None:
    """What of that it finds is less than all; and all of it does not count as long as nobody knows."""
    pacing = Pacing(max_downtime_s=1.0, max_rounds=30, fixed_s=0.0)
    assert pacing.judge(1 << 10, RATE, 200 * MIB) == "again"
    assert verdicts(pacing, 40, 20, 19) == ["again", "again", "switch"]
    assert Pacing(max_downtime_s=1.0, max_rounds=1, fixed_s=0.0).judge(0, RATE, 200 * MIB) == "switch"
    assert Pacing(max_downtime_s=1.0, max_rounds=30, fixed_s=0.0).judge(0, RATE, 4 << 10) == "switch"


def test_what_nobody_knows_does_not_have_a_tree_held_back_later() -> None:
    pacing = Pacing(0.3, 30, 0.0, auto_converge=True)
    throttled = []
    for unknown in (4 << 10, 0, 0):
        assert pacing.judge(100 * MIB, RATE, unknown) == "again"
        throttled.append(pacing.throttle_percentage)
    assert throttled == [0, 0, 20]
