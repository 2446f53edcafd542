"""When the rounds of a live migration end, and the tree is stopped. Pure.

Each round sends what was written during the one before. With the rate of the link, what is left to be sent tells how
long the tree would stand still. While that still falls, one more round costs nothing but bytes; so the switch comes
when it is short enough and has stopped to fall, or when what is left does not count: beside the time that a tree of
many processes stands still anyway, a lot does not.

A tree that writes faster than the link takes it can be held back (`pipeline.stages.throttle`) until its rounds fall: as
QEMU's auto-converge does, by a share of its time that begins small and grows with each round that brings nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: what is left is falling if it is less than this share of what was left before
_FALLING = 0.8
#: rounds in a row that bring nothing, until it is said that they lead nowhere
_PATIENCE = 3
#: rounds in a row that bring nothing, until the tree is held back
_UNTIL_THROTTLED = 2
#: how much it is held back, as QEMU: at first, more with each round that brings nothing, and at most
_FIRST_PERCENT, _MORE_PERCENT, _MOST_PERCENT = 20, 10, 99
#: so little is sent in no time; and so is what takes less than this share of the time that is fixed
_NOTHING_BYTES = 512 << 10
_NOTHING_SHARE = 0.05

Verdict = Literal["again", "switch", "too long"]


@dataclass
class Pacing:
    """Judges one migration.

    Args:
        max_downtime_s: how long the tree may stand still.
        max_rounds: how many rounds there may be, the first one counted.
        fixed_s: how long it stands still whatever is left.
        auto_converge: it may be held back.
        throttle_percentage: how much of its time it is to stand still meanwhile.
        untracked_bytes: what goes when it stands still, whatever is written; may be set at any time.
    """

    max_downtime_s: float
    max_rounds: int
    fixed_s: float
    auto_converge: bool = False
    throttle_percentage: int = 0
    untracked_bytes: int = 0

    def __post_init__(self) -> None:
        self.rounds = 0
        self._least: int | None = None
        self._in_vain = 0

    def expected_s(self, left_bytes: int, rate_bytes_s: float) -> float:
        """How long the tree would stand still now."""
        whole = left_bytes + self.untracked_bytes
        return self.fixed_s + (whole / rate_bytes_s if rate_bytes_s else 0.0)

    def judge(self, left_bytes: int, rate_bytes_s: float, unknown_bytes: int = 0) -> Verdict:
        """What to do after a round; `throttle_percentage` is then that of the next one.

        Args:
            left_bytes: written during it.
            rate_bytes_s: of the link, as far as is known.
            unknown_bytes: may have been written, too, which only the next round can tell.
        """
        self.rounds += 1
        most_bytes = left_bytes + unknown_bytes
        falls = self._least is None or most_bytes < _FALLING * self._least
        self._in_vain = 0 if falls else self._in_vain + 1
        if self._least is None or most_bytes < self._least:
            self._least = most_bytes
        short = self.expected_s(left_bytes, rate_bytes_s) <= self.max_downtime_s
        if short and not falls:
            return "switch"
        is_nothing = most_bytes <= max(_NOTHING_BYTES, _NOTHING_SHARE * self.fixed_s * rate_bytes_s)
        if is_nothing or self.rounds >= self.max_rounds:
            return "switch" if short else "too long"
        can_throttle = self.auto_converge and self.throttle_percentage < _MOST_PERCENT
        if can_throttle and left_bytes > _NOTHING_BYTES:
            self._throttle()
        elif self._in_vain >= _PATIENCE:
            return "too long"
        return "again"

    def _throttle(self) -> None:
        """Hold it back more, if the rounds bring nothing."""
        if not self.throttle_percentage and self._in_vain >= _UNTIL_THROTTLED:
            self.throttle_percentage, self._in_vain = _FIRST_PERCENT, 0
        elif self.throttle_percentage and self._in_vain:
            self.throttle_percentage = min(self.throttle_percentage + _MORE_PERCENT, _MOST_PERCENT)
            self._in_vain = 0
