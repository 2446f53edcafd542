"""Whether compression pays: the rate of the way out against rate and ratio of each codec. Pure.

Compressing and sending overlap, so pages leave at the lower of two rates: that at which the codec
takes them, and that of the way out times the ratio. The way out is only measured with what is
sent as it is: compressed buffers may fit into the socket's memory, and would make any link look fast. So
the first buffers go out plain, and a few more now and then, ever more rarely.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.image.frames import Codec

#: plain buffers before the first choice, and in each later measurement of the way out
_FIRST = 3
_AGAIN = 3
#: of those, so many fill the socket's memory and say nothing
_SWALLOWED = 1
#: buffers between two measurements of the way out, at first and at the most
_PAUSE, _MAX_PAUSE = 64, 1024
#: buffers between two samples given to the codecs, and the size of one
_SAMPLE_EVERY = 16
_SAMPLE_BYTES = 256 << 10
#: what is faster by less than this is no reason to change
_GAIN = 1.15
#: what is not faster than nothing by this is given up
_LOSS = 1.05
#: weight of the past in a running mean
_PAST = 0.75


@dataclass
class _Mean:
    """A rate in bytes a second, over what came lately."""

    count: float = 0.0
    seconds: float = 0.0

    def add(self, count: float, seconds: float) -> None:
        self.count = self.count * _PAST + count
        self.seconds = self.seconds * _PAST + seconds

    def rate(self) -> float:
        return self.count / self.seconds if self.seconds > 0 else float("inf")


class Chooser:
    """Says for each buffer with what it is to be compressed.

    Args:
        compress: (codec, bytes) -> compressed bytes, for samples.
        clock: in seconds.
    """

    def __init__(
        self,
        compress: Callable[[Codec, memoryview], bytes],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._compress = compress
        self._clock = clock
        self._way = _Mean()
        self._codecs: dict[Codec, tuple[_Mean, _Mean]] = {
            codec: (_Mean(), _Mean()) for codec in Codec if codec != Codec.NONE
        }
        self._count = 0
        #: plain buffers still to be given out, and reports of plain ones to be passed over
        self._plain = _FIRST
        self._skip = _SWALLOWED
        self._pause = _PAUSE
        self._next_measure = 0
        self.current = Codec.NONE

    def next(self, content: memoryview) -> Codec:
        """The codec for `content`."""
        if self._count % _SAMPLE_EVERY == 0:
            self._sample(content)
        self._count += 1
        if self._plain:
            self._plain -= 1
            return Codec.NONE
        if self.current != Codec.NONE and self._count >= self._next_measure:
            self._pause = min(2 * self._pause, _MAX_PAUSE)
            self._next_measure = self._count + self._pause
            self._plain, self._skip, self._way = _AGAIN - 1, _SWALLOWED, _Mean()
            return Codec.NONE
        self._choose()
        return self.current

    def compressed(self, codec: Codec, before: int, after: int, seconds: float) -> None:
        """`codec` made `after` bytes of `before`, and took so long."""
        rate, ratio = self._codecs[codec]
        rate.add(before, seconds)
        ratio.add(before, after)

    def sent(self, count: int, seconds: float) -> None:
        """`count` bytes that were not compressed took so long on their way out."""
        if self._skip:
            self._skip -= 1
        else:
            self._way.add(count, seconds)

    def _sample(self, content: memoryview) -> None:
        begin = max(0, len(content) - _SAMPLE_BYTES) // 2
        sample = content[begin : begin + _SAMPLE_BYTES]
        if not sample:
            return
        for codec in self._codecs:
            started = self._clock()
            after = len(self._compress(codec, sample))
            self.compressed(codec, len(sample), after, self._clock() - started)

    def _choose(self) -> None:
        if not self._way.seconds:
            return
        rates = {Codec.NONE: self._way.rate()}
        for codec, (rate, ratio) in self._codecs.items():
            rates[codec] = min(rate.rate(), self._way.rate() * ratio.rate())
        best = max(rates, key=lambda codec: rates[codec])
        if rates[best] > _GAIN * rates[self.current]:
            if self.current == Codec.NONE:
                self._next_measure = self._count + self._pause
            self.current = best
        elif rates[self.current] < _LOSS * rates[Codec.NONE]:
            self.current = Codec.NONE
