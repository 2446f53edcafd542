"""The forest of user namespaces of an image, and what an id of one is in another.

Namespace 0 is the external one, shared with the surroundings. Every other has a
parent in the forest. All translations go along the edges of the forest, one map at a
time, so an id is exact at any depth or is said to have no mapping.

Source: user_namespaces(7).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

from pipeline.errors import ImageError
from pipeline.image.schema import Id, UserNamespace
from pipeline.userns.idmap import IDENTITY, IdMap

IdKind = Literal["uid", "gid", "projid"]

#: levels below the initial namespace that the kernel takes: it asks whether the *parent* is deeper than 32
MAX_DEPTH = 33


_OWNER_KINDS: tuple[IdKind, IdKind] = ("uid", "gid")
#: what an id without a number looks like (/proc/sys/kernel/overflowuid)
OVERFLOW_ID = 65534


class Forest:
    """All user namespaces of an image, by index.

    Args:
        namespaces: with namespace 0, the external one.
        outside: from ids of namespace 0 to ids of the host or restorer; kinds left out are the same.

    Raises:
        ImageError: from here and from every translation: a namespace is missing, or they form a ring.
    """

    def __init__(
        self, namespaces: Iterable[UserNamespace], outside: Mapping[IdKind, IdMap] | None = None
    ) -> None:
        self.namespaces = {namespace.index: namespace for namespace in namespaces}
        self._maps: dict[tuple[int, IdKind], IdMap] = {}
        for namespace in self.namespaces.values():
            list(self.ancestors(namespace.index))
            self._maps[namespace.index, "uid"] = IdMap(namespace.uid_map)
            self._maps[namespace.index, "gid"] = IdMap(namespace.gid_map)
            self._maps[namespace.index, "projid"] = IdMap(namespace.projid_map)
        for kind in get_args(IdKind):
            self._maps[0, kind] = IDENTITY if outside is None else outside.get(kind, IDENTITY)

    def ancestors(self, index: int) -> Iterator[int]:
        """`index` itself, its parent, and so on up to namespace 0."""
        at: int | None = index
        for _ in range(MAX_DEPTH + 2):
            if at is None:
                return
            if at not in self.namespaces:
                raise ImageError(f"user namespace {at} is not part of the image")
            yield at
            at = self.namespaces[at].parent
        raise ImageError(f"user namespace {index} is nested deeper than {MAX_DEPTH}, or in a ring")

    def is_within(self, inner: int, outer: int) -> bool:
        """Whether `inner` is `outer` or below it."""
        return outer in self.ancestors(inner)

    def map_of(self, index: int, kind: IdKind) -> IdMap:
        """The map between namespace `index` and its parent; of namespace 0: to the ids outside of the image."""
        return self._maps[index, kind]

    def lines_of(self, index: int, kind: IdKind) -> IdMap:
        """The map of namespace `index` as it is written here: those of roots with ids outside of the image."""
        own = self._maps[index, kind]
        outside = self._maps[0, kind]
        return own if self.namespaces[index].parent != 0 or outside is IDENTITY else own.compose(outside)

    def to_ancestor(self, index: int, ancestor: int, kind: IdKind) -> IdMap:
        """From ids of `index` to ids of an ancestor."""
        composed = IDENTITY
        for at in self.ancestors(index):
            if at == ancestor:
                return composed
            step = self._maps[at, kind]
            composed = step if composed is IDENTITY else composed.compose(step)
        raise ValueError(f"user namespace {ancestor} is no ancestor of {index}")

    def number_in(self, wanted: Id, namespace: int, kind: IdKind) -> int | None:
        """What `wanted` is called in `namespace` (0: outside of the image); None where it has no mapping there."""
        above: list[int] = list(self.ancestors(namespace))
        number = wanted.id
        for at in self.ancestors(wanted.ns):
            if at in above:
                break
            found = self._maps[at, kind].up(number)
            if found is None:
                return None
            number = found
        for step in reversed(above[: above.index(at)]):
            found = self._maps[step, kind].down(number)
            if found is None:
                return None
            number = found
        return number if namespace else self._maps[0, kind].up(number)

    def makers_ids(self, index: int) -> tuple[int, int]:
        """A uid and a gid to make things with in namespace `index`: 0 where it is mapped, else the first that is."""
        maps = [self.map_of(index, kind) for kind in _OWNER_KINDS]
        uid, gid = (0 if m.up(0) is not None or not m.extents else m.extents[0].inner for m in maps)
        return uid, gid

    def maps_overflow(self, index: int) -> tuple[bool, bool]:
        """Whether the overflow uid and gid are numbers of namespace `index`, and not only a lack of one."""
        uid, gid = (self.map_of(index, kind).up(OVERFLOW_ID) is not None for kind in _OWNER_KINDS)
        return (uid, gid) if index else (True, True)

    def at_a_root(self, found: Id, kind: IdKind) -> Id:
        """An id that nobody in the tree holds (a file's owner): in the root of the forest that maps it, if one does."""
        for namespace in self.namespaces.values():
            if namespace.parent == 0:
                number = self.number_in(found, namespace.index, kind)
                if number is not None:
                    return Id(namespace.index, number)
        return found

    def innermost(self, external: int, holder: int, kind: IdKind) -> Id:
        """An id that namespace 0 calls `external`, said in the innermost namespace from `holder` upwards."""
        outer = Id(0, external)
        for at in self.ancestors(holder):
            number = self.number_in(outer, at, kind)
            if number is not None:
                return Id(at, number)
        return outer
