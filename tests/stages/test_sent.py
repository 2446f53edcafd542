"""What was sent of shared memory: only the pages that have changed are sent again, and holes as zeros."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest

from pipeline.ids import LocalFd
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.pagemap import PAGE_BYTES, Range, union
from pipeline.kernel.syscalls import syscall
from pipeline.resources.memory.pages import Segment, data_runs, read_file_runs, read_segments
from pipeline.stages.sent import LastSent, Sent

CHUNK = Sent.CHUNK_BYTES
SIZE = 3 * CHUNK + 5 * PAGE_BYTES
_KEEP_SIZE, _PUNCH_HOLE = 1, 2


@pytest.fixture
def memory() -> Iterator[LocalFd]:
    fd = LocalFd(os.memfd_create("shared"))
    try:
        os.truncate(fd, SIZE)
        yield fd
    finally:
        os.close(fd)


def arrive(there: bytearray, segments: Sequence[Segment], view: memoryview) -> None:
    """Put what was sent, one behind the other, where it belongs."""
    at = 0
    for start, length in segments:
        there[start : start + length] = view[at : at + length]
        at += length


def send(
    sent: Sent, fd: LocalFd, there: bytearray, behind_a_read: Callable[[], object] = lambda: None
) -> int:
    """Send what has changed to `there`; how many bytes that were."""

    def read(wanted: Sequence[Segment], view: memoryview) -> int:
        (_, count), *more = read_file_runs(fd, [(start, start + length) for start, length in wanted], view)
        assert not more
        behind_a_read()
        return count

    total = 0
    for offset, runs in sent.chunks(data_runs(fd, SIZE), SIZE):
        view = memoryview(bytearray(CHUNK))
        segments, count = sent.reading(offset, runs, read)(view)
        assert sum(length for _, length in segments) == count
        arrive(there, segments, view)
        total += count
    return total


def punch(fd: LocalFd, start: int, length: int) -> None:
    syscall(NR.fallocate, fd, _KEEP_SIZE | _PUNCH_HOLE, start, length)


def test_a_page_that_has_changed_goes_alone(memory: LocalFd) -> None:
    os.pwrite(
        memory, random.Random(1).randbytes(SIZE), 0
    )  # which has other bytes there than those that follow
    sent, there = Sent(), bytearray(SIZE)
    assert send(sent, memory, there) == SIZE
    assert send(sent, memory, there) == 0
    os.pwrite(memory, b"new", CHUNK + 5 * PAGE_BYTES + 77)
    os.pwrite(memory, b"new", CHUNK + 9 * PAGE_BYTES - 1)
    assert send(sent, memory, there) == 3 * PAGE_BYTES
    assert there == os.pread(memory, SIZE, 0)
    os.pwrite(memory, b"the last one", SIZE - 12)
    assert send(sent, memory, there) == PAGE_BYTES
    assert there == os.pread(memory, SIZE, 0)


def test_whatever_is_written_and_dropped_arrives(memory: LocalFd) -> None:
    chance = random.Random(1)
    sent, there = Sent(), bytearray(SIZE)
    pages = SIZE // PAGE_BYTES
    for _ in range(200):
        for _ in range(chance.randrange(4)):
            start = chance.randrange(pages)
            length = chance.randrange(1, min(pages - start, 48) + 1)
            if chance.random() < 0.5:
                punch(memory, start * PAGE_BYTES, length * PAGE_BYTES)
            else:
                os.pwrite(memory, chance.randbytes(length * PAGE_BYTES), start * PAGE_BYTES)
        send(sent, memory, there)
        assert there == os.pread(memory, SIZE, 0)
    assert send(sent, memory, there) == 0
    assert not sent.has_changed(memory, SIZE)
    os.pwrite(memory, b"?", 0)
    assert sent.has_changed(memory, SIZE)


def test_what_is_written_while_it_is_read_is_not_taken_for_sent(memory: LocalFd) -> None:
    """Where a hole has come, it is read twice; and the tree may run."""
    os.pwrite(memory, b"a" * 4 * PAGE_BYTES, 0)
    sent, there = Sent(), bytearray(SIZE)
    send(sent, memory, there)
    punch(memory, 3 * PAGE_BYTES, PAGE_BYTES)
    send(sent, memory, there, behind_a_read=lambda: os.pwrite(memory, b"b", PAGE_BYTES))
    os.pwrite(memory, b"a", PAGE_BYTES)
    send(sent, memory, there)
    assert there == os.pread(memory, SIZE, 0)


def send_written(sent: Sent, fd: LocalFd, there: bytearray, written: Sequence[Range]) -> int:
    """Send what has changed of these pages to `there`, in pieces of two chunks; how many bytes that were."""
    total = 0
    chunks: set[int] = set()
    for piece in sent.written_pieces(written, 2 * CHUNK):
        assert sum(length for _, length in piece) <= 2 * CHUNK
        own = {at // CHUNK for start, length in piece for at in range(start, start + length, PAGE_BYTES)}
        assert not own & chunks, "two who read at once have a chunk in common"
        chunks |= own
        view = memoryview(bytearray(2 * CHUNK))
        segments, count = sent.reading_written(piece, partial(read_segments, fd))(view)
        assert sum(length for _, length in segments) == count
        arrive(there, segments, view)
        total += count
    return total


def test_of_pages_that_may_have_been_written_those_go_that_have_changed(memory: LocalFd) -> None:
    os.pwrite(memory, b"a" * CHUNK, 0)
    sent, there = Sent(), bytearray(SIZE)
    send(sent, memory, there)
    os.pwrite(memory, b"b", 3 * PAGE_BYTES)
    os.pwrite(memory, b"b", 2 * CHUNK)
    changed = send_written(sent, memory, there, [(0, 9 * PAGE_BYTES), (2 * CHUNK, 3 * CHUNK)])
    assert changed == 2 * PAGE_BYTES, (
        "the page that was written, and the only one of zeros that is none any more"
    )
    assert there == os.pread(memory, SIZE, 0)
    os.pwrite(memory, b"c", PAGE_BYTES)
    assert not send_written(sent, memory, there, [(0, PAGE_BYTES), (2 * PAGE_BYTES, CHUNK)]), "nobody said so"
    assert not send_written(sent, memory, there, [])
    assert send_written(sent, memory, there, [(PAGE_BYTES, 2 * PAGE_BYTES)]) == PAGE_BYTES


def test_whatever_is_written_and_dropped_arrives_if_all_of_it_is_said(memory: LocalFd) -> None:
    """In turns with looks at all of it."""
    chance = random.Random(2)
    sent, there = Sent(), bytearray(SIZE)
    pages = SIZE // PAGE_BYTES
    written: list[Range] = []
    for _ in range(400):
        for _ in range(chance.randrange(4)):
            start = chance.randrange(pages)
            end = start + chance.randrange(1, min(pages - start, 300) + 1)
            written = union(written, [(start * PAGE_BYTES, end * PAGE_BYTES)])
            if chance.random() < 0.5:
                punch(memory, start * PAGE_BYTES, (end - start) * PAGE_BYTES)
            elif chance.random() < 0.8:
                os.pwrite(memory, chance.randbytes((end - start) * PAGE_BYTES), start * PAGE_BYTES)
        if chance.random() < 0.2:
            send(sent, memory, there)
        else:
            send_written(sent, memory, there, written)
        written = []
        assert there == os.pread(memory, SIZE, 0)


def news(last: LastSent, start: int, *pages: bytes) -> dict[int, bytes]:
    """What is to be sent of pages that lie at an address one behind the other: by address."""
    view = memoryview(bytearray(b"".join(page * PAGE_BYTES for page in pages)))
    wanted, count = last.news([(start, len(view))] if pages else [], view)
    assert count == sum(length for _, length in wanted)
    found: dict[int, bytes] = {}
    at = 0
    for address, length in wanted:
        for page in range(address, address + length, PAGE_BYTES):
            content = bytes(view[at : at + PAGE_BYTES])
            assert content == content[:1] * PAGE_BYTES
            found[page] = content[:1]
            at += PAGE_BYTES
    return found


def test_a_page_that_has_its_content_again_is_not_sent() -> None:
    last = LastSent()
    assert news(last, 0, b"a", b"b", b"c", b"d") == {0: b"a", 4096: b"b", 8192: b"c", 12288: b"d"}
    assert news(last, 0, b"a", b"x", b"c", b"y") == {4096: b"x", 12288: b"y"}
    assert news(last, 0, b"a", b"b", b"c", b"y") == {4096: b"b"}, "it was sent with another one since"
    assert not news(last, 0, b"a", b"b", b"c", b"y")
    assert news(last, 3 * PAGE_BYTES, b"d", b"e") == {12288: b"d", 16384: b"e"}


def test_a_page_that_is_no_longer_there_is_sent_though_it_is_the_same() -> None:
    last = LastSent()
    news(last, 0, b"a", b"b", b"c")
    last.forget([(PAGE_BYTES, 2 * PAGE_BYTES), (1 << 40, (1 << 40) + PAGE_BYTES)])
    assert news(last, 0, b"a", b"b", b"c") == {4096: b"b"}
    last.clear()
    assert len(news(last, 0, b"a", b"b", b"c")) == 3


def test_pages_next_to_each_other_are_one_segment() -> None:
    view = memoryview(bytearray(b"".join(bytes([number]) * PAGE_BYTES for number in range(6))))
    last = LastSent()
    last.news([(2 * PAGE_BYTES, PAGE_BYTES)], memoryview(bytes([2]) * PAGE_BYTES))
    wanted, count = last.news([(0, 3 * PAGE_BYTES), (3 * PAGE_BYTES, 3 * PAGE_BYTES)], view)
    assert wanted == [(0, 2 * PAGE_BYTES), (3 * PAGE_BYTES, 3 * PAGE_BYTES)]
    assert bytes(view[:count:PAGE_BYTES]) == bytes([0, 1, 3, 4, 5])


def test_what_is_the_same_cannot_be_reckoned_from_outside(memory: LocalFd) -> None:
    """Whoever knows two pages with the same digest could have one taken for the other."""
    os.pwrite(memory, b"content", 0)
    sent = [Sent(), Sent()]
    for one in sent:
        send(one, memory, bytearray(SIZE))
    assert sent[0]._chunks[0].digests != sent[1]._chunks[0].digests
