"""What was sent of shared memory: only the pages that have changed are sent again, and holes as zeros."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

import pytest

from pipeline.ids import LocalFd
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.kernel.syscalls import syscall
from pipeline.resources.memory.pages import Segment, data_runs, read_file_runs
from pipeline.stages.memory import Sent

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


def send(sent: Sent, fd: LocalFd, there: bytearray) -> int:
    """Send what has changed to `there`; how many bytes that were."""

    def read(wanted: Sequence[Segment], view: memoryview) -> int:
        (_, count), *more = read_file_runs(fd, [(start, start + length) for start, length in wanted], view)
        assert not more
        return count

    total = 0
    for offset, runs in sent.chunks(data_runs(fd, SIZE), SIZE):
        view = memoryview(bytearray(CHUNK))
        segments, count = sent.reading(offset, runs, read)(view)
        assert sum(length for _, length in segments) == count
        at = 0
        for start, length in segments:
            there[start : start + length] = view[at : at + length]
            at += length
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
