"""System calls laid out in memory: the table, what its pointers lead to, and what is read back."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest

from pipeline.ids import RemoteAddress
from pipeline.remote.calls import CALL_BYTES, Call, In, Layout, Out, lay_out, take_results

BASE = RemoteAddress(0x7FFF_0000_1000)


def table(layout: Layout, count: int) -> list[tuple[int, ...]]:
    return [struct.unpack_from("<8Q", layout.image, at * CALL_BYTES) for at in range(count)]


def at(layout: Layout, address: int, size: int) -> bytes:
    start = address - BASE
    assert start % 16 == 0, "for whatever the kernel reads there"
    assert start >= 0
    assert start + size <= len(layout.image)
    return layout.image[start : start + size]


def test_numbers_stand_as_they_are() -> None:
    layout = lay_out([Call(39), Call(157, (-1, 1 << 63, 3))], BASE)
    assert table(layout, 2) == [(39, 0, 0, 0, 0, 0, 0, 0), (157, (1 << 64) - 1, 1 << 63, 3, 0, 0, 0, 0)]
    assert len(layout.image) == 2 * CALL_BYTES


def test_bytes_and_room_lie_behind_the_table() -> None:
    name, plain, filled = b"a name\0", Out(5), Out(8, b"abc")
    layout = lay_out([Call(1, (name, plain)), Call(2, (7, filled))], BASE)
    (_, to_name, to_plain, *_), (_, seven, to_filled, *_) = table(layout, 2)
    assert seven == 7
    assert min(to_name, to_plain, to_filled) >= BASE + 2 * CALL_BYTES
    assert at(layout, to_name, 7) == name
    assert at(layout, to_plain, 5) == bytes(5)
    assert at(layout, to_filled, 8) == b"abc" + bytes(5)
    spans = sorted([(to_name, 7), (to_plain, 5), (to_filled, 8)])
    assert all(one + size <= other for (one, size), (other, _) in pairwise(spans))


def test_what_is_given_twice_is_one() -> None:
    """One call fills what another reads, and a structure points to both."""
    shared = Out(16)
    layout = lay_out([Call(1, (shared,)), Call(2, (shared, In([b"12345678", 9, shared, In([-1])])))], BASE)
    (_, first, *_), (_, second, to_both, *_) = table(layout, 2)
    assert first == second
    text, nine, to_shared, to_inner = struct.unpack("<8s3Q", at(layout, to_both, 32))
    assert (text, nine, to_shared) == (b"12345678", 9, first)
    assert at(layout, to_inner, 8) == b"\xff" * 8
    assert [out for _, out in layout.outs] == [shared]


def test_each_call_has_its_own_of_the_same_bytes() -> None:
    given = b"0123456789abcdef"
    layout = lay_out([Call(1, (given,)), Call(2, (given,))], BASE)
    (_, first, *_), (_, second, *_) = table(layout, 2)
    assert abs(first - second) >= len(given)
    assert at(layout, first, 16) == at(layout, second, 16) == given


def test_results_are_read_back() -> None:
    calls = [Call(1, (Out(4),)), Call(2, may_fail=True)]
    layout = lay_out(calls, BASE)
    image = bytearray(layout.image)
    struct.pack_into("<q", image, 56, 4)
    struct.pack_into("<q", image, CALL_BYTES + 56, -22)
    ((offset, out),) = layout.outs
    image[offset : offset + 4] = b"told"
    take_results(calls, layout, bytes(image))
    assert [call.result for call in calls] == [4, -22]
    assert out.data == b"told"


def test_a_call_has_six_arguments_at_most() -> None:
    with pytest.raises(ValueError, match="six arguments"):
        lay_out([Call(1, range(7))], BASE)
