"""The files that an image needs by name, looked up here before anything of its tree is made.

What is lacking or differs is named, all of it at once. Files in the surroundings of the tree are looked at first
of all; those in mount namespaces of its own when these have their mounts. What is found here is opened, and looked
at, once more when it is needed: this look only comes early.
"""

from __future__ import annotations

import os
import stat
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec

from pipeline.errors import Blocker, ImageError
from pipeline.ids import LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import MappedFile, PathRef
from pipeline.policy import Files, RestorePolicy
from pipeline.resources import directory, opath, regular
from pipeline.resources.identity import is_newer, refusal

_NAMED: dict[str, Any] = {kind.name: kind for kind in (regular.KIND, directory.KIND, opath.KIND)}
_REMEDY = (
    "bring the file of the source here, accept the one that is here (--files any), or take it along with the "
)
_REMEDY += "image (dump --with-files)"

#: opens a path of the image, in its root
Open = Callable[[PathRef, int], LocalFd]


class Written:
    """Mapped files that are newer here than a draft says: the tree runs on, and may have written to them since.

    They are compared once more when it stands still: `check`.

    Args:
        live: there is a draft; else nothing is excused.
    """

    def __init__(self, *, live: bool) -> None:
        self._is_live = live
        self._files: set[int] = set()

    def refusal(self, file: MappedFile, files: Files, fd: LocalFd) -> str | None:
        """`identity.refusal`, but for what that may be."""
        wrong = refusal(fd, file.identity, files)
        if wrong and self._is_live and is_newer(fd, file.identity):
            self._files.add(file.index)
            return None
        return wrong

    def check(self, image: Image, open_path: Open, policy: RestorePolicy) -> Iterator[Blocker]:
        """Those of them that are not what `image` says of the tree that stands still."""
        for file in image.mapped_files.values():
            if file.index in self._files:
                same = partial(refusal, wanted=file.identity, files=policy.files)
                yield from _look("mapped file", file.path, open_path, same)


def check(
    image: Image, namespaces: Collection[int], open_path: Open, policy: RestorePolicy, written: Written
) -> Iterator[Blocker]:
    """Whatever is lacking here, or is not what it was.

    Args:
        namespaces: the mount namespaces in which to look.
        open_path: see `Open`.
        written: excuses what the tree may have written since.

    Raises:
        ImageError: the record of an open file is damaged.
    """
    taken = {(file.path.mntns, file.path.path) for file in image.taken_files.values()}
    seen: set[object] = set()

    def is_new(path: PathRef, what: object) -> bool:
        """Whether it is to be looked at, and was not yet: a thousand descriptors of one file need one look."""
        key = path, what
        if path.mntns not in namespaces or (path.mntns, path.path) in taken or key in seen:
            return False
        seen.add(key)
        return True

    for mapped in image.mapped_files.values():
        if mapped.content is None and is_new(mapped.path, mapped.identity):
            same = partial(written.refusal, mapped, policy.files)
            yield from _look("mapped file", mapped.path, open_path, same)
    for file in image.files.values():
        kind = _NAMED.get(file.kind)
        if kind is None:
            continue
        try:
            record = msgspec.convert(file.state, kind.record)
        except msgspec.ValidationError as error:
            raise ImageError(f"open file {file.index} ({file.kind}): {error}") from None
        which = getattr(record, "identity", None), getattr(record, "inode", 0), file.flags & os.O_ACCMODE
        if not _comes_later(record) and is_new(record.path, which):
            what = f"open {'file' if file.kind == 'regular' else file.kind}"
            yield from _look(what, record.path, open_path, partial(kind.refusal, file, record, policy))
    to_make = sorted(taken)
    for process in image.processes.values():
        cwd = process.cwd
        if cwd is None or process.cwd_removed is not None or cwd.path.startswith(b"/proc/"):
            continue
        if is_new(cwd, "cwd") and not _is_above(cwd, to_make):
            yield from _look(f"working directory of pid {process.pids[0]}", cwd, open_path, _no_directory)


def _is_above(directory: PathRef, files: Sequence[tuple[int, bytes]]) -> bool:
    """Whether one of `files` (mount namespace and path, sorted) is below a directory, which is made with it then."""
    below = directory.mntns, directory.path + b"/"
    at = bisect_left(files, below)
    return at < len(files) and files[at][0] == below[0] and files[at][1].startswith(below[1])


def _no_directory(fd: LocalFd) -> str | None:
    return None if stat.S_ISDIR(os.fstat(fd).st_mode) else "it is no directory"


def _comes_later(record: Any) -> bool:
    """Whether a place is there only when the tree is: of its processes, its sockets, and what it had removed."""
    if isinstance(record, opath.PathState):
        return record.kernels or stat.S_IFMT(record.identity.mode) not in (stat.S_IFREG, stat.S_IFDIR)
    return isinstance(record, directory.DirectoryState) and (record.kernels or record.removed is not None)


def _look(
    what: str, path: PathRef, open_path: Open, wrong_with: Callable[[LocalFd], str | None]
) -> Iterator[Blocker]:
    name = f"{what} {os.fsdecode(path.path)}"
    try:
        fd = open_path(path, os.O_PATH)
    except (FileNotFoundError, NotADirectoryError) as error:
        yield Blocker(name, f"is not here: {error.strerror}", _REMEDY)
        return
    except OSError:  # whoever is to open it may get there
        return
    try:
        wrong = wrong_with(fd)
    finally:
        os.close(fd)
    if wrong:
        yield Blocker(name, f"is not what it was: {wrong}", _REMEDY)
