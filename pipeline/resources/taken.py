"""Files whose content goes along (``--with-files GLOB``), and how they are made where they are lacking.

A name matches as fnmatch(3) has it, ``*`` also across ``/``; a pattern without ``/`` or ``*`` in front begins at the
working directory of the process. Meant are files that the tree has open or mapped by a name. Kept: bytes, holes,
permissions, owner, time of modification, attributes of users and the access control list. Directories that are
lacking, too, get the permissions and the owner that they had, or, where nobody of the tree has that id, the file's.

At the destination a file that is there has to be what it was (`pipeline.resources.identity`); one that is lacking is
made (`pipeline.resources.made_files`). An image could ask for anything: so a file is made with the rights of its
owner, who has to be an id that a process of the tree runs as; other files only where whoever restores names them
(``--with-files GLOB`` of restore and serve). When the restore fails, all of it is removed.

Sources: fnmatch(3), openat2(2) RESOLVE_IN_ROOT.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial

from pipeline.errors import Blocker, RebuildError, raise_if_exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import FileOwner, Id, Index, PathRef, TakenFile
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import RESOLVE, openat2, syscall
from pipeline.policy import RestorePolicy
from pipeline.resources import attributes, sparse
from pipeline.resources.acting import UNCHANGED, in_changed_thread
from pipeline.resources.identity import identity, is_leased, refusal
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.made_files import MadeFiles, give_owner
from pipeline.resources.paths import look_up

_PLACE = os.O_PATH | os.O_DIRECTORY


def matches(patterns: Sequence[str], pid: HostPid, name: bytes) -> bool:
    """Whether a file that `pid` has under this name is meant."""
    if not patterns:
        return False
    here = ""
    with suppress(OSError):
        here = os.readlink(f"/proc/{pid}/cwd")
    text = os.fsdecode(name)
    return any(fnmatchcase(text, p if p.startswith(("/", "*")) else f"{here}/{p}") for p in patterns)


def check(view: FdView, scope: CaptureScope) -> Iterator[Blocker]:
    """Whether a file that is to go along may be read."""
    if matches(scope.policy.with_files, view.namer, view.link):
        if is_leased(view.local):
            why = "its content is to go along, and there is a lease on it, which reading it could break"
            yield Blocker(view.subject, why, "release the lease, or bring the file to the destination")
            return
        try:
            os.close(_reader(view.local))
        except OSError as error:
            raise_if_exhausted(error)
            why = f"its content is to go along, and cannot be read: {error.strerror}"
            yield Blocker(view.subject, why, "run as root, or bring the file to the destination")


def _reader(fd: int) -> LocalFd:
    return LocalFd(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))


class Takings:
    """The files of a tree that go along; each is taken once.

    Args:
        patterns: of `DumpPolicy.with_files`.
        path: a path of the image, for a name as a process sees it.
        content: carries the bytes behind a descriptor, see `CaptureScope.content`.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        path: Callable[[HostPid, bytes], PathRef],
        content: Callable[[LocalFd, int], Index],
    ) -> None:
        self._patterns = patterns
        self._path = path
        self._content = content
        self._files: dict[tuple[int, bytes], TakenFile] = {}

    @property
    def records(self) -> list[TakenFile]:
        """All of them."""
        return list(self._files.values())

    def take(self, pid: HostPid, name: bytes, fd: int) -> None:
        """Take the file behind `fd` (O_PATH, too), which `pid` knows by `name`, if its name matches.

        Raises:
            OSError: it may not be read.
        """
        if not matches(self._patterns, pid, name):
            return
        path = self._path(pid, name)
        found = os.fstat(fd)
        if (path.mntns, path.path) in self._files or not stat.S_ISREG(found.st_mode):
            return
        if is_leased(fd):
            raise OSError(errno.EBUSY, "there is a lease on it")
        reader = _reader(fd)
        try:
            content = self._content(reader, found.st_size)
        finally:
            os.close(reader)
        steps = name.strip(b"/").split(b"/")
        self._files[path.mntns, path.path] = TakenFile(
            index=len(self._files),
            path=path,
            identity=identity(fd),
            owner=_owner(found),
            attributes=attributes.captured(fd, _user, _user),
            content=content,
            above=[_owner(look_up(pid, b"/" + b"/".join(steps[:at]))) for at in range(1, len(steps))],
        )


def _user(number: int) -> Id:
    return Id(0, number)


def _owner(found: os.stat_result) -> FileOwner:
    return FileOwner(stat.S_IMODE(found.st_mode), Id(0, found.st_uid), Id(0, found.st_gid))


class Making:
    """The files of an image that came along: compared, made, and removed again unless they are kept.

    Args:
        image: the records.
        open_path: opens a path of the image, in its root.
        content: the descriptor with the bytes of a space.
        uid, gid: what an id is called here; raise RebuildError.
        policy: of whoever restores.
    """

    def __init__(
        self,
        image: Image,
        open_path: Callable[[PathRef, int], LocalFd],
        content: Callable[[int], LocalFd],
        uid: Callable[[Id], int],
        gid: Callable[[Id], int],
        policy: RestorePolicy,
    ) -> None:
        self._open_path = open_path
        self._content = content
        self._uid, self._gid = uid, gid
        self._policy = policy
        self._made = MadeFiles()
        credentials = [t.credentials for p in image.processes.values() for t in p.threads]
        self._uids = set(self._numbers({one for c in credentials for one in c.uids}, uid))
        self._gids = set(self._numbers({one for c in credentials for one in (*c.gids, *c.groups)}, gid))

    @staticmethod
    def _numbers(ids: set[Id], number: Callable[[Id], int]) -> Iterator[int]:
        for one in ids:
            with suppress(RebuildError):
                yield number(one)

    def check(self, files: Sequence[TakenFile]) -> Iterator[Blocker]:
        """What is there and differs, and what may not be made."""
        for file in files:
            name = os.fsdecode(file.path.path)
            try:
                found = self._open_path(file.path, os.O_PATH)
            except FileNotFoundError:
                if not self._may_make(file):
                    owner = f"{file.owner.uid.id}:{file.owner.gid.id}"
                    yield Blocker(
                        f"file {name}",
                        f"is lacking here, and belongs to {owner}, as whom no process of the tree runs",
                        f"bring it here, or let the image make it: --with-files '{name}'",
                    )
            except OSError as error:
                raise_if_exhausted(error)
                yield Blocker(f"file {name}", f"cannot be looked up: {error.strerror}", "")
            else:
                try:
                    wrong = refusal(found, file.identity, self._policy.files)
                finally:
                    os.close(found)
                if wrong:
                    yield Blocker(
                        f"file {name}",
                        f"is there, and not the one that came along: {wrong}",
                        "move it out of the way, or accept it: --files any",
                    )

    def make(self, files: Sequence[TakenFile]) -> list[str]:
        """Make what is lacking; its names.

        Raises:
            RebuildError: it cannot be made here.
        """
        made = []
        for file in files:
            name = os.fsdecode(file.path.path)
            try:
                os.close(self._open_path(file.path, os.O_PATH))
            except FileNotFoundError:
                try:
                    self._make(file)
                except OSError as error:
                    raise RebuildError(f"file {name} cannot be made here: {error.strerror}") from error
                except (ValueError, OverflowError) as error:
                    raise RebuildError(f"file {name!r} cannot be made: {error}") from error
                made.append(name)
        return made

    def keep(self) -> None:
        """What was made stays."""
        self._made.keep()

    def close(self) -> None:
        """Remove what was made and is not kept; idempotent."""
        self._made.close()

    def _is_own(self, owner: FileOwner) -> bool:
        """Whether a process of the tree runs as this owner, or as root of these surroundings."""
        return 0 in self._uids or (self._uid(owner.uid) in self._uids and self._gid(owner.gid) in self._gids)

    def _is_named(self, file: TakenFile) -> bool:
        return matches(self._policy.with_files, HostPid(os.getpid()), file.path.path)

    def _may_make(self, file: TakenFile) -> bool:
        return self._is_named(file) or self._is_own(file.owner)

    def _make(self, file: TakenFile) -> None:
        if not self._may_make(file):
            how = f"--with-files '{os.fsdecode(file.path.path)}'"
            raise PermissionError(
                errno.EPERM, f"it belongs to nobody of the tree; let the image make it: {how}"
            )
        as_they_are = 0 in self._uids or self._is_named(file)
        act = _as_we_are if as_they_are else _as_owner(self._uid(file.owner.uid), self._gid(file.owner.gid))
        steps = file.path.path.strip(b"/").split(b"/")
        above = self._open_path(PathRef(file.path.mntns, b"/"), _PLACE)
        try:
            for number, step in enumerate(steps[:-1]):
                owner = file.above[number] if number < len(file.above) else file.owner
                if not (as_they_are or self._is_own(owner)):
                    owner = FileOwner(owner.mode, file.owner.uid, file.owner.gid)
                path = PathRef(file.path.mntns, b"/" + b"/".join(steps[: number + 1]))
                below = self._directory(above, step, owner, path, act)
                os.close(above)
                above = below
            act(lambda: self._made.file(above, steps[-1], partial(self._fill, file)))
        finally:
            os.close(above)

    def _directory(
        self,
        above: LocalFd,
        name: bytes,
        owner: FileOwner,
        path: PathRef,
        act: Callable[[Callable[[], None]], None],
    ) -> LocalFd:
        """The directory `name` in `above`, made if need be; the caller owns it."""
        with suppress(FileNotFoundError):
            return self._open_path(path, _PLACE)

        def make() -> None:
            self._made.directory(above, name, owner.mode, self._uid(owner.uid), self._gid(owner.gid))

        act(make)
        return openat2(above, name, _PLACE | os.O_NOFOLLOW, 0, RESOLVE.BENEATH)

    def _fill(self, file: TakenFile, fd: LocalFd) -> None:
        sparse.copy(self._content(file.content), fd, file.identity.size_bytes)
        give_owner(fd, self._uid(file.owner.uid), self._gid(file.owner.gid))
        os.fchmod(fd, file.owner.mode)
        attributes.give(fd, file.attributes, self._uid, self._gid)
        os.utime(fd, ns=(file.identity.mtime_ns, file.identity.mtime_ns))


def _as_we_are(act: Callable[[], None]) -> None:
    act()


def _as_owner(uid: int, gid: int) -> Callable[[Callable[[], None]], None]:
    """Run something with the rights of `uid`; PermissionError where they are not ours, and we may not take them on."""

    def run(act: Callable[[], None]) -> None:
        def change_and_act() -> None:
            try:
                syscall(NR.setgroups, 0, None)
                syscall(NR.setresgid, UNCHANGED, gid, UNCHANGED)
                syscall(NR.setresuid, UNCHANGED, uid, UNCHANGED)
            except PermissionError:
                if uid != os.geteuid():
                    raise
            act()

        in_changed_thread(change_and_act)

    return run
