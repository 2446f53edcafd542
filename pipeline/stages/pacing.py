"""When the rounds of a live migration end, and the tree is stopped. Pure.

Each round sends what was written during the one before. With the rate of the link, what is left to be sent tells how
long the tree would stand still. While that still falls, one more round costs nothing but bytes; so the switch comes
when it is short enough and has stopped to fall, or so small that it does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: what is left is falling if it is less than this share of what was left before
_FALLING = 0.8
#: rounds in a row that bring nothing, until it is said that they lead nowhere
_PATIENCE = 3
#: so little is sent in no time
_NOTHING_BYTES = 512 << 10

Verdict = Literal["again", "switch", "too long"]


@dataclass
class Pacing:
    """Judges one migration.

    Args:
        max_downtime_s: how long the tree may stand still.
        max_rounds: how many rounds there may be, the first one counted.
        fixed_s: how long it stands still whatever is left.
    """

    max_downtime_s: float
    max_rounds: int
    fixed_s: float

    def __post_init__(self) -> None:
        self.rounds = 0
        self._least: int | None = None
        self._in_vain = 0

    def expected_s(self, left_bytes: int, rate_bytes_s: float) -> float:
        """How long the tree would stand still now."""
        return self.fixed_s + (left_bytes / rate_bytes_s if rate_bytes_s else 0.0)

    def judge(self, left_bytes: int, rate_bytes_s: float) -> Verdict:
        """What to do after a round.

        Args:
            left_bytes: written during it.
            rate_bytes_s: of the link, as far as is known.
        """
        self.rounds += 1
        falls = self._least is None or left_bytes < _FALLING * self._least
        self._in_vain = 0 if falls else self._in_vain + 1
        if self._least is None or left_bytes < self._least:
            self._least = left_bytes
        short = self.expected_s(left_bytes, rate_bytes_s) <= self.max_downtime_s
        if short and (left_bytes <= _NOTHING_BYTES or not falls):
            return "switch"
        if self.rounds >= self.max_rounds or self._in_vain >= _PATIENCE:
            return "switch" if short else "too long"
        return "again"
