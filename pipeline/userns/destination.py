"""Where the ids of an image lie at the destination: the one edge of the forest that speaks of a host.

An image says nothing of a host. Its namespace 0 is the surroundings of the tree, and only the roots
of the forest have maps into it. The destination decides what the ids of namespace 0 are *here*, by
one more map, from namespace 0 to the restorer's own user namespace:

* `same`: to themselves, as far as they are mapped here at all;
* `BASE:COUNT`: whatever the roots map to goes into that range;
* `auto`: into what this user may use: the own ids, and the ranges of subuid(5) and subgid(5).

The last two move *pieces*: runs of ids that the roots' lines cover, as long as they overlap. A piece is
never split, because a line of a root has to lie within one line of the map around it. Ids that two
roots share they share afterwards; what was apart stays apart. Inside the forest nothing changes.

What has no place here is an explicit state. `--unmapped refuse` names it before anything is made;
with `--unmapped overflow` the overflow id stands for it.

Sources: user_namespaces(7), subuid(5), newuidmap(1).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from pipeline.errors import Blocker, RebuildError, Refused, UsageError
from pipeline.image.codec import Image
from pipeline.image.schema import Credentials, Extent, Id, Process, UserNamespace
from pipeline.userns.forest import Forest, IdKind
from pipeline.userns.idmap import IDENTITY, NO_ID, IdMap, parse
from pipeline.userns.permitted import ask_for_ranges, subordinate_ranges, user_name

Unmapped = Literal["refuse", "overflow"]
#: (first id, how many)
Range = tuple[int, int]

_KINDS: tuple[IdKind, ...] = ("uid", "gid")
_OVERFLOW = "/proc/sys/kernel/overflow"
#: every id there is, but the one that is none
_ALL = [Extent(0, 0, NO_ID)]


class Destination:
    """What every id of an image is called here.

    Args:
        image: complete.
        placing: ``same``, ``BASE:COUNT`` or ``auto``.
        unmapped: what becomes of ids that have no place here.

    Raises:
        UsageError: `placing` is none of these, or not possible here.
        RebuildError: the ranges are too small.
    """

    def __init__(self, image: Image, placing: str = "same", unmapped: Unmapped = "refuse") -> None:
        check_options(placing, unmapped)
        namespaces = list(image.user_namespaces.values())
        here = {kind: _mapped_here(kind) for kind in _KINDS}
        self.forest = Forest(
            namespaces, {kind: _outside(placing, kind, namespaces, here[kind]) for kind in _KINDS}
        )
        self._image = image
        self._placing = placing
        self._unmapped = unmapped
        self._overflow = {kind: _overflow_id(kind, here[kind]) for kind in _KINDS}
        self._groups_fixed = Path("/proc/self/setgroups").read_bytes().strip() == b"deny"

    @property
    def numbers_stay(self) -> bool:
        """Whether ids of namespace 0 are called here what they were called, as far as they have a place."""
        return self._placing == "same"

    # -- one id -------------------------------------------------------------------------

    def number(self, wanted: Id, namespace: int, kind: IdKind) -> int | None:
        """What `wanted` is called in a namespace of the image; 0: here. None where it has no number there."""
        found = self.forest.number_in(wanted, namespace, kind)
        if found is None and namespace == 0 and self._unmapped == "overflow":
            return self._overflow[kind]
        return found

    def uid(self, wanted: Id, namespace: int) -> int | None:
        """`number` of a uid."""
        return self.number(wanted, namespace, "uid")

    def gid(self, wanted: Id, namespace: int) -> int | None:
        """`number` of a gid."""
        return self.number(wanted, namespace, "gid")

    def uid_here(self, wanted: Id) -> int:
        """A uid as the restorer sees it, for owners of files and sockets.

        Raises:
            RebuildError: it has none.
        """
        return self._here(wanted, "uid")

    def gid_here(self, wanted: Id) -> int:
        """`uid_here` of a gid."""
        return self._here(wanted, "gid")

    def _here(self, wanted: Id, kind: IdKind) -> int:
        number = self.number(wanted, 0, kind)
        if number is None:
            raise RebuildError(f"{self.describe(wanted, kind)} has no place here")
        return number

    def describe(self, wanted: Id, kind: IdKind) -> str:
        """An id in words, with the line of the map that is next to it."""
        where = "the surroundings" if wanted.ns == 0 else f"user namespace {wanted.ns}"
        text = f"{kind} {wanted.id} of {where}"
        at = wanted
        for index in self.forest.ancestors(wanted.ns):
            table = self.forest.map_of(index, kind)
            above = table.up(at.id)
            if above is None:
                near = table.nearest(at.id)
                line = (
                    f"; the next line of the map is `{near.inner} {near.lower} {near.count}`" if near else ""
                )
                return text + line
            at = Id(0, above)
        return text

    # -- all of them ----------------------------------------------------------------------

    def refuse_unplaced(self) -> None:
        """Raise Refused with every id that is needed here and has no place; nothing was made yet."""
        blockers = [*self._unplaced_lines(), *self._unplaced_owners()]
        for process in self._image.processes.values():
            blockers += self._unplaced_of(process)
        if blockers:
            raise Refused(blockers)

    def _remedy(self) -> str:
        return "restore with --map auto or --map BASE:COUNT, as root, or with --unmapped overflow"

    def _unplaced_lines(self) -> Iterator[Blocker]:
        """Lines of roots that would be lost."""
        for namespace in self._image.user_namespaces.values():
            if namespace.parent != 0:
                continue
            for kind in _KINDS:
                outside = self.forest.map_of(0, kind)
                for line in _lines(namespace, kind):
                    placed = IdMap([line]).compose(outside).extents
                    if [extent.count for extent in placed] != [line.count]:
                        near = outside.nearest(line.lower)
                        known = (
                            f"; the nearest ids here are {near.lower}-{near.lower + near.count - 1}"
                            if near
                            else ""
                        )
                        yield Blocker(
                            f"user namespace {namespace.index}",
                            f"line `{line.inner} {line.lower} {line.count}` of its {kind}_map has no place here{known}",
                            "restore with --map auto or --map BASE:COUNT, or as root; a plain user needs newuidmap, "
                            "newgidmap and ranges in /etc/subuid and /etc/subgid",
                        )

    def _unplaced_owners(self) -> Iterator[Blocker]:
        for shared in self._image.shared_memory.values():
            for kind, wanted in (("uid", shared.uid), ("gid", shared.gid)):
                if wanted is not None and self.number(wanted, 0, kind) is None:  # type: ignore[arg-type]
                    what = self.describe(wanted, kind)  # type: ignore[arg-type]
                    yield Blocker(
                        f"shared memory {os.fsdecode(shared.name)}", f"belongs to {what}", self._remedy()
                    )

        for file in self._image.files.values():
            for wanted in (file.owner.uid, file.owner.euid) if file.owner is not None else ():
                if wanted is not None and self.number(wanted, 0, "uid") is None:
                    what = self.describe(wanted, "uid")
                    yield Blocker(
                        f"open file {file.index} ({file.kind})",
                        f"sends signals on behalf of {what}",
                        self._remedy(),
                    )

    def _unplaced_of(self, process: Process) -> Iterator[Blocker]:
        for thread in process.threads:
            for what, kind, wanted in _ids_of(thread.credentials, self._groups_fixed):
                holder = thread.credentials.userns
                placed = self.forest.number_in(wanted, holder, kind) is not None and holder != 0
                if not placed and self.number(wanted, 0, kind) is None:
                    yield Blocker(
                        f"pid {thread.pids[0]}",
                        f"its {what} {self.describe(wanted, kind)} has no place here",
                        self._remedy(),
                    )


def _ids_of(wanted: Credentials, groups_fixed: bool) -> Iterator[tuple[str, IdKind, Id]]:
    """All ids of a task; its supplementary groups only where they can be set at all."""
    yield from (("uid", "uid", one) for one in wanted.uids)
    yield from (("gid", "gid", one) for one in wanted.gids)
    if not groups_fixed:
        yield from (("supplementary group", "gid", one) for one in wanted.groups)


def _lines(namespace: UserNamespace, kind: IdKind) -> Sequence[Extent]:
    return namespace.uid_map if kind == "uid" else namespace.gid_map


def _mapped_here(kind: IdKind) -> list[Range]:
    """The ids that exist in our own user namespace."""
    return [(line.inner, line.count) for line in parse(Path(f"/proc/self/{kind}_map").read_bytes())]


def _overflow_id(kind: IdKind, here: Sequence[Range]) -> int | None:
    """The id that stands for what has no place; the own one where even that is not mapped here."""
    number = int(Path(f"{_OVERFLOW}{kind}").read_bytes())
    if any(first <= number < first + count for first, count in here):
        return number
    return None


def check_options(placing: str, unmapped: str) -> None:
    """See that --map and --unmapped can be meant here, whatever the image; raises UsageError."""
    if unmapped not in get_args(Unmapped):
        raise UsageError(f"--unmapped {unmapped}: say refuse or overflow")
    for kind in _KINDS:
        _outside(placing, kind, [], _mapped_here(kind))


def _outside(placing: str, kind: IdKind, namespaces: Iterable[UserNamespace], here: list[Range]) -> IdMap:
    """From ids of the image's namespace 0 to ids here."""
    if placing == "same":
        return (
            IDENTITY if here == [(0, NO_ID)] else IdMap(Extent(first, first, count) for first, count in here)
        )
    ranges = _own_ranges(kind, here) if placing == "auto" else [_range(placing, kind, here)]
    lines = [line for namespace in namespaces if namespace.parent == 0 for line in _lines(namespace, kind)]
    wanted = pieces(lines)
    try:
        return place(wanted, ranges, kind)
    except RebuildError as error:
        if placing != "auto":
            raise
        largest = max(count for _, count in wanted)
        raise RebuildError(f"{error}; {ask_for_ranges(largest)}") from None


def _range(text: str, kind: IdKind, here: Iterable[Range]) -> Range:
    base, colon, count = text.partition(":")
    if not (
        colon and base.isascii() and base.isdigit() and count.isascii() and count.isdigit() and int(count)
    ):
        raise UsageError(f"--map {text}: say same, auto, or BASE:COUNT such as 200000:65536")
    wanted = int(base), int(count)
    if not any(first <= wanted[0] and sum(wanted) <= first + size for first, size in here):
        raise UsageError(
            f"--map {text}: not all of these {kind}s exist in the user namespace of the restorer"
        )
    return wanted


def _own_ranges(kind: IdKind, here: list[Range]) -> list[Range]:
    """What this user may give away: in a user namespace all that is mapped, on the host what subuid(5) grants."""
    own = os.geteuid() if kind == "uid" else os.getegid()
    if here != [(0, NO_ID)]:
        return [(own, 1), *_without(here, own)]
    user = user_name()
    ranges = subordinate_ranges(f"/etc/sub{kind}", user, os.geteuid())
    if not ranges:
        raise UsageError(
            f"--map auto: /etc/sub{kind} has no range for {user}; add a line such as `{user}:200000:65536`, or "
            "say --map BASE:COUNT"
        )
    return ranges


def _without(ranges: Iterable[Range], number: int) -> Iterator[Range]:
    for first, count in ranges:
        if not first <= number < first + count:
            yield first, count
            continue
        if number > first:
            yield first, number - first
        if number + 1 < first + count:
            yield number + 1, first + count - number - 1


def pieces(lines: Iterable[Extent]) -> list[Range]:
    """The runs of lower ids that lines cover; lines that overlap, in different namespaces, are of one piece."""
    found: list[Range] = []
    for line in sorted(lines, key=lambda line: line.lower):
        if found and line.lower < sum(found[-1]):
            first, count = found[-1]
            found[-1] = first, max(first + count, line.lower + line.count) - first
        else:
            found.append((line.lower, line.count))
    return found


def place(wanted: Sequence[Range], ranges: Sequence[Range], kind: IdKind) -> IdMap:
    """A map that puts each piece, whole, at the first place that is free for it.

    Args:
        wanted: pieces, apart from each other.
        ranges: where they may lie, apart from each other, in the order in which they are used.

    Raises:
        RebuildError: they do not fit; says how many ids are needed.
    """
    free = list(ranges)
    placed = []
    for first, count in wanted:
        at = next((number for number, (_, size) in enumerate(free) if size >= count), None)
        if at is None:
            needed, given = sum(size for _, size in wanted), sum(size for _, size in ranges)
            raise RebuildError(
                f"--map: {count} {kind}s from {first} on find no place in one piece: the tree needs {needed} "
                f"{kind}s, and {given} are given in {len(ranges)} ranges"
            )
        start, size = free[at]
        placed.append(Extent(first, start, count))
        free[at] = start + count, size - count
    return IdMap(placed)
