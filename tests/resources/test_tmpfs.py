"""What an image says that a tmpfs holds is not believed: no entry may lead out of it."""

from __future__ import annotations

import stat

import pytest

from pipeline.errors import ImageError, RebuildError
from pipeline.image.schema import Id, SemaphoreUndo
from pipeline.resources.namespaces import ipc, tmpfs
from pipeline.resources.namespaces.tmpfs import Entry
from pipeline.resources.tasks import semaphore_undo

ROOT = Id(0, 0)
DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
TOP = Entry(b".", DIRECTORY, ROOT, ROOT, 0)


def entry(path: bytes, mode: int = FILE, link: int = -1) -> Entry:
    return Entry(path, mode, ROOT, ROOT, 0, link=link)


def test_entries_below_directories_that_came_before_are_taken() -> None:
    tmpfs.check([TOP, entry(b"a", DIRECTORY), entry(b"a/b"), entry(b"c", link=2), entry(b"d", LINK)])


@pytest.mark.parametrize(
    "entries",
    [
        [entry(b"a")],
        [TOP, entry(b"../a")],
        [TOP, entry(b"..", DIRECTORY)],
        [TOP, entry(b"/etc/passwd")],
        [TOP, entry(b"a/b")],
        [TOP, entry(b"a", DIRECTORY), entry(b"a/../../b")],
        [TOP, entry(b"a", LINK), entry(b"a/b")],
        [TOP, entry(b"a", DIRECTORY), entry(b"a/")],
        [TOP, entry(b"a", link=1)],
        [TOP, entry(b"a", link=7)],
        [TOP, TOP],
    ],
)
def test_an_entry_that_leads_elsewhere_is_refused(entries: list[Entry]) -> None:
    with pytest.raises(ImageError, match="leads elsewhere"):
        tmpfs.check(entries)


def test_a_sysctl_that_is_none_of_an_ipc_namespace_is_refused() -> None:
    with pytest.raises(ImageError, match="kernel/core_pattern is no limit"):
        ipc.check(ipc.IpcState(sysctls={"kernel/core_pattern": b"|/bin/sh"}))


def test_an_adjustment_of_no_semaphore_is_refused() -> None:
    with pytest.raises(RebuildError, match="semaphore 3 of set 5 is not in the image"):
        semaphore_undo.reinstate([SemaphoreUndo(5, 3, 1)], [], lambda *_: 0)
