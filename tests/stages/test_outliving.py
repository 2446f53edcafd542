"""Whose memory may outlive its process: not with what would outlive it, too."""

from __future__ import annotations

import pytest

from pipeline.ids import HostPid
from pipeline.image.schema import AddressSpace, FileIdentity, MappedFile, OpenFile, PathRef, Record, Vma
from pipeline.resources.locks import Lock
from pipeline.resources.memfd import MemfdState
from pipeline.resources.regular import RegularState
from pipeline.stages.memory import ProcessPages
from pipeline.stages.outliving import large_memories

MIB = 1 << 20
IDENTITY = FileIdentity(0, 0, 0)
ANONYMOUS = Vma(0x10000, 0x10000 + 64 * MIB, "anon", 3, 2)
LIBRARY = Vma(0x8000, 0x9000, "file", 5, 2, backing=1)
SHARED = Vma(0x8000, 0x9000, "file", 3, 1, backing=1)
READ_ONLY = Vma(0x8000, 0x9000, "file", 1, 1, backing=1, readonly_file=True)
SEGMENT = Vma(0x8000, 0x9000, "sysv", 3, 1, backing=7)
RING = Vma(0x8000, 0x9000, "aio", 3, 1)
PAGES = [ProcessPages(1, HostPid(100), [(0x10000, 0x10000 + 64 * MIB)])]
FLOCK = Lock("flock", write=True)
POSIX = Lock("posix", write=True)


def tree(vma: Vma, name: bytes = b"/lib/a.so") -> list[tuple[Record, Record | None]]:
    return [
        (AddressSpace(space=1, vmas=[vma, ANONYMOUS], exe=1, layout=[0] * 11, auxv=b""), None),
        (MappedFile(index=1, path=PathRef(1, name), identity=IDENTITY), None),
    ]


def opened(state: Record) -> tuple[Record, Record | None]:
    return OpenFile(index=1, kind="file", flags=0), state


def regular(name: bytes, lock: Lock, last_name: bytes = b"") -> tuple[Record, Record | None]:
    return opened(RegularState(path=PathRef(1, name), identity=IDENTITY, last_name=last_name, locks=[lock]))


@pytest.mark.parametrize("vma", [ANONYMOUS, LIBRARY, READ_ONLY])
def test_large_memory_may(vma: Vma) -> None:
    (found,) = large_memories(tree(vma), PAGES)
    assert found == (1, 100, 0x10000, 64 * MIB)


@pytest.mark.parametrize("vma", [SHARED, SEGMENT, RING])
def test_memory_with_what_counts_at_its_end_may_not(vma: Vma) -> None:
    assert not large_memories(tree(vma), PAGES)


def test_small_memory_is_given_back_at_once() -> None:
    assert not large_memories(tree(LIBRARY), [ProcessPages(1, HostPid(100), [(0x10000, 0x20000)])])


@pytest.mark.parametrize(
    ("file", "may"),
    [
        (regular(b"/run/lock", FLOCK), True),
        (regular(b"/lib/a.so", POSIX), True),
        (regular(b"/lib/a.so", FLOCK), False),
        (regular(b"/elsewhere/a.so", FLOCK), False),
        (regular(b"/run/lock", FLOCK, b"/run/old"), False),
        (opened(MemfdState(space=3, locks=[FLOCK])), False),
        (opened(MemfdState(space=3)), True),
    ],
)
def test_a_lock_on_what_is_mapped_would_outlive_it(file: tuple[Record, Record | None], may: bool) -> None:
    assert bool(large_memories([*tree(LIBRARY), file], PAGES)) == may
