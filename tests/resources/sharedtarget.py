"""A process that shares memory with its children, and writes to it in any way it is told to."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal

import pytest

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import smaps
from pipeline.kernel.pagemap import PAGE_BYTES
from pipeline.resources.memory import shared_tracking
from pipeline.resources.memory.objects import Window
from pipeline.stages import freeze

PAGES = 64
SIZE = PAGES * PAGE_BYTES
SPACE = 7
MREMAP_MAYMOVE = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p


class Family:
    """A child that shares a mapping of `PAGES` pages with its children, the first half of them written.

    It does what it is told, one word at a time, and of what; children that stay do what they are told through it.
    """

    def __init__(self) -> None:
        theirs, self._tell = os.pipe()
        self._hear, mine = os.pipe()
        self.pid = HostPid(os.fork())
        if self.pid == 0:
            try:
                os.close(self._tell)
                os.close(self._hear)
                Member(theirs, mine).obey()
            finally:
                os._exit(1)
        os.close(theirs)
        os.close(mine)
        self.start = int(self._answer())
        found = [one for one in smaps.maps(self.pid) if one.start <= self.start < one.end]
        self.keys = {(found[0].device, found[0].inode): SPACE}

    def do(self, words: str) -> None:
        os.write(self._tell, words.encode() + b"\n")
        assert self._answer() == "done"

    def _answer(self) -> str:
        answer = b""
        while not answer.endswith(b"\n"):
            answer += os.read(self._hear, 1) or pytest.fail("it has ended")
        return answer.decode().strip()

    def windows(self) -> dict[int, list[Window]]:
        """Where those below it, and itself, have the memory mapped now."""
        return shared_tracking.windows(freeze.walk(self.pid), self.keys)

    def opened(self) -> LocalFd:
        """The memory, opened as the tree has not; the caller's."""
        (window, *_) = self.windows()[SPACE]
        name = f"/proc/{window.pid}/map_files/{window.start:x}-{window.end:x}"
        return LocalFd(os.open(name, os.O_RDWR | os.O_CLOEXEC))

    def watched(self) -> bool:
        return any("uw" in one.flags for pid in freeze.walk(self.pid) for one in smaps.smaps(pid))

    def close(self) -> None:
        for pid in reversed(freeze.walk(self.pid)):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._tell)
        os.close(self._hear)


class Member:
    """What runs in the family's first process, and in its children."""

    def __init__(self, hear: int, tell: int) -> None:
        self._lines = os.fdopen(hear, "r", buffering=1)
        self._tell = tell
        self._memory = mmap.mmap(-1, SIZE)
        self._memory[: SIZE // 2] = b"w" * (SIZE // 2)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._child: tuple[int, int] | None = None

    def obey(self) -> None:
        os.write(self._tell, b"%d\n" % self._address)
        for line in self._lines:
            word, *numbers = line.split()
            getattr(self, word)(*(int(one) if one.isdecimal() else one for one in numbers))
            os.write(self._tell, b"done\n")

    def write(self, *pages: int) -> None:
        for page in pages:
            self._memory[page * PAGE_BYTES] ^= 0x55

    def read(self, *pages: int) -> None:
        assert [self._memory[page * PAGE_BYTES] for page in pages]

    def by_a_child_that_ends(self, page: int) -> None:
        pid = os.fork()
        if pid == 0:
            self.write(page)
            os._exit(0)
        os.waitpid(pid, 0)

    def by_a_mapping_that_goes(self, page: int) -> None:
        other = _libc.mremap(ctypes.c_void_p(self._address), 0, SIZE, MREMAP_MAYMOVE)
        assert other not in (None, 2**64 - 1)
        ctypes.memset(other + page * PAGE_BYTES, 0x77, 1)
        _libc.munmap(ctypes.c_void_p(other), SIZE)

    def by_page_tables_that_are_emptied(self, page: int) -> None:
        self.write(page)
        self._advise(page, mmap.MADV_DONTNEED)

    def by_a_hole(self, page: int) -> None:
        self._advise(page, mmap.MADV_REMOVE)

    def by_a_hole_that_is_looked_into(self, page: int) -> None:
        self.by_a_hole(page)
        self.read(page)

    def by_a_file(self, page: int) -> None:
        with open("/proc/self/exe", "rb", buffering=0) as file:
            file.readinto(memoryview(self._memory)[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])  # type: ignore[attr-defined]

    def open_directly(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)

    def close(self) -> None:
        os.close(self._fd)

    def _advise(self, page: int, advice: int) -> None:
        assert not _libc.madvise(ctypes.c_void_p(self._address + page * PAGE_BYTES), PAGE_BYTES, advice)

    def bear(self) -> None:
        """A child that stays, and that `its_child` writes through."""
        theirs, tell = os.pipe()
        hear, mine = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(tell)
            os.close(hear)
            self._lines, self._tell, self._child = os.fdopen(theirs, "r", buffering=1), mine, None
            self.obey_on()
        os.close(theirs)
        os.close(mine)
        self._child = tell, hear

    def obey_on(self) -> None:
        for line in self._lines:
            word, *numbers = line.split()
            getattr(self, word)(*map(int, numbers))
            os.write(self._tell, b".")
        os._exit(0)

    def child_writes(self, page: int) -> None:
        assert self._child is not None
        os.write(self._child[0], b"write %d\n" % page)
        assert os.read(self._child[1], 1) == b"."

    def child_unmaps(self) -> None:
        assert self._child is not None
        os.write(self._child[0], b"unmap\n")
        assert os.read(self._child[1], 1) == b"."

    def unmap(self) -> None:
        assert not _libc.munmap(ctypes.c_void_p(self._address), SIZE)

    def child_ends(self) -> None:
        assert self._child is not None
        for fd in self._child:
            os.close(fd)
        os.wait()
        self._child = None
