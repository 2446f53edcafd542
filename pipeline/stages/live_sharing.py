"""What processes share, sent while the tree runs: shared memory, files without a name; and what has changed since.

Each round looks at it anew. All of it is read and compared with what was sent, but for shared memory of which it can be
told what may have been written (`pipeline.resources.memory.shared_tracking`): of that, nothing else is read.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel.pagemap import Range, total_bytes, union
from pipeline.kernel.userfaultfd import Inside
from pipeline.ledger import LEDGER
from pipeline.resources.memory import devices
from pipeline.resources.memory.objects import InodeKey, Window
from pipeline.resources.memory.shared_tracking import SharedTracking, Shown, is_worth_it, windows
from pipeline.resources.memory.tracking import TrackingLost
from pipeline.stages import freeze
from pipeline.stages.memory import FilePages, PageSource, SharedPages
from pipeline.stages.sent import Sent


class LiveSharing:
    """See the module. `add`, `watch`, `look_last` and `lacking` while the tree is stopped.

    Ownership: holds descriptors of what is shared, until `let_go`, and what watches it, until `close`.
    """

    def __init__(self) -> None:
        self._sources: list[SharedPages | FilePages] = []
        self._sent: dict[int, Sent] = {}
        self._held: list[LocalFd] = []
        self._rounds = 0
        #: how much was sent of each space before the last round
        self._sent_before: dict[int, int] = {}
        self._tracking = SharedTracking()
        #: the spaces of what is watched, and where they are mapped in the draft
        self._keys: dict[InodeKey, int] = {}
        self._windows: list[Window] = []
        #: what may have been written of them since it was taken; None: any of it
        self._written: dict[int, list[Range] | None] = {}
        #: those that devices may have been writing to at a look
        self._doubtful: set[int] = set()

    def add(self, source: SharedPages | FilePages) -> None:
        """Keep hold of an object of the draft, to send it."""
        self._sent[source.space] = sent = Sent()
        if isinstance(source, FilePages):
            source = msgspec.structs.replace(source, fd=self._hold(source.fd), sent=sent)
        else:
            shared = source.shared
            fd = self._hold(shared.fd) if shared.fd is not None else None
            if fd is not None and is_worth_it(shared):
                inode = os.fstat(fd)
                self._keys[inode.st_dev, inode.st_ino] = source.space
                self._windows += shared.windows
            source = SharedPages(source.space, replace(shared, fd=fd), sent)
        self._sources.append(source)

    def _hold(self, fd: LocalFd) -> LocalFd:
        """A description of our own, where that may be had: nobody's locks hang on it."""
        try:
            mine = LocalFd(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            mine = LocalFd(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0))
        LEDGER.take("shared memory of a draft", mine)
        self._held.append(mine)
        return mine

    def watch(self, pid: HostPid, inside: Inside) -> None:
        """Begin to watch what a process shows of the objects that were added, if that can be done and pays."""
        shown = [window for window in self._windows if window.pid == pid]
        if shown and not self._tracking.begin(pid, inside, shown):
            self._watch_no_more()

    def _watch_no_more(self) -> None:
        self._windows.clear()
        self._keys.clear()
        self._written.clear()
        self._tracking.close()

    def __contains__(self, space: int) -> bool:
        return space in self._sent

    def ranges(self, space: int, size_bytes: int) -> list[Range]:
        """The pages of a space that had data when it was sent, as far as they are within a size."""
        return self._sent[space].ranges(size_bytes)

    # -- while it runs ---------------------------------------------------------------------

    def look_first(self, root: HostPid) -> None:
        """Ask who has what is watched: the tree below `root` alone, or it is not watched. Then as `look`."""
        if not self._keys:
            return
        where = self._where(HostPid(int(name)) for name in os.listdir("/proc") if name.isdecimal())
        members = set(freeze.walk(root))
        for key, space in list(self._keys.items()):
            if any(window.pid not in members for window in where[space]):
                del self._keys[key]
        if not self._keys:
            self._watch_no_more()
        self.look(root)

    def _where(self, pids: Iterable[HostPid]) -> dict[int, list[Window]]:
        """Where these have what is watched mapped; if one of them may not be looked at, nothing is watched any more."""
        try:
            return windows(pids, self._keys)
        except OSError:
            self._watch_no_more()
            return {}

    def look(self, root: HostPid) -> None:
        """Ask what may have been written since the last time by the tree below `root`."""
        if not self._keys:
            return
        where = self._where(freeze.walk(root))
        shown = {
            one.space: Shown(one.shared.fd, one.shared.record.size_bytes, where[one.space])
            for one in self._sources
            if isinstance(one, SharedPages) and one.space in where and one.shared.fd is not None
        }
        self._note(self._tracking.collect(shown))
        # behind it, as for private memory; and of those, too, that were forked since
        pids = {window.pid for one in shown.values() for window in one.windows}
        self._doubt({pid for pid in pids if _may_be_written_to(pid)}, shown)

    def _note(self, found: dict[int, list[Range] | None]) -> None:
        for space, runs in found.items():
            before = self._written.get(space)
            self._written[space] = None if runs is None or before is None else union(before, runs)

    def _doubt(self, pids: set[HostPid], shown: dict[int, Shown]) -> None:
        self._doubtful |= {
            space for space, one in shown.items() if any(window.pid in pids for window in one.windows)
        }

    def left_bytes(self) -> int:
        """How much may have been written that was not sent; of what is not told of, as much as the last round sent."""
        found = 0
        for one in self._asked_again():
            written = self._written.get(one.space)
            if written is not None:
                found += total_bytes(written)
            elif self._rounds > 1:
                found += self._sent[one.space].bytes - self._sent_before[one.space]
        return found

    def unknown_bytes(self) -> int:
        """How much was sent once, and may have been written since; the next round tells."""
        if self._rounds != 1:
            return 0
        unknown = (one.space for one in self._asked_again() if self._written.get(one.space) is None)
        return sum(self._sent[space].bytes for space in unknown)

    def _asked_again(self) -> list[SharedPages | FilePages]:
        """Not what is read out of a process, which may have ended; nor what a namespace was made with."""
        return [
            one
            for one in self._sources
            if (one.shared.fd is not None if isinstance(one, SharedPages) else not one.early)
        ]

    def take(self, *, first: bool) -> list[PageSource]:
        """What to send now: what has changed; the `first` time all."""
        self._rounds += 1
        self._sent_before = {space: sent.bytes for space, sent in self._sent.items()}
        return [self._taken(one) for one in (self._sources if first else self._asked_again())]

    def _taken(self, source: SharedPages | FilePages) -> SharedPages | FilePages:
        if isinstance(source, FilePages) or source.space not in self._written:
            return source
        written, self._written[source.space] = self._written[source.space], []
        return msgspec.structs.replace(source, written=written)

    # -- at the end --------------------------------------------------------------------------

    def look_last(self, sources: Sequence[PageSource], doubtful: set[HostPid]) -> None:
        """Ask what may have been written by a tree that stands still; then what is `lacking`.

        Args:
            sources: of all of its pages.
            doubtful: the processes that devices may write to, or may have been writing to at a look.
        """
        shown = {
            one.space: Shown(one.shared.fd, one.shared.record.size_bytes, one.shared.windows)
            for one in sources
            if isinstance(one, SharedPages) and one.space in self._written and one.shared.fd is not None
        }
        self._note(self._tracking.collect(shown))
        self._doubt(doubtful, shown)

    def lacking(self, source: SharedPages | FilePages) -> PageSource:
        """What was not sent of an object of the tree that stands still.

        Raises:
            TrackingLost: what has changed cannot be sent any more.
        """
        sent = self._sent.get(source.space, Sent())
        if isinstance(source, FilePages):
            if source.early and sent.has_changed(source.fd, source.size_bytes):
                raise TrackingLost("what its tmpfs or System V segments hold has changed")
            return msgspec.structs.replace(source, sent=sent)
        is_known = source.space not in self._doubtful and not source.shared.is_open
        written = self._written.get(source.space) if is_known else None
        return msgspec.structs.replace(source, sent=sent, written=written)

    def let_go(self) -> None:
        """The rounds are over: descriptors are not needed any more; idempotent."""
        self._sources.clear()
        while self._held:
            fd = self._held.pop()
            os.close(fd)
            LEDGER.give_back("shared memory of a draft", fd)

    def close(self) -> None:
        """Give everything back; idempotent."""
        self.let_go()
        self._tracking.close()


def _may_be_written_to(pid: HostPid) -> bool:
    """Whether devices may be writing to the memory of a process."""
    try:
        return devices.may_write_to(pid)
    except OSError:  # it may not be looked at
        return True
