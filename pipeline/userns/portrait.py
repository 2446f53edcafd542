"""A picture of the namespaces of a tree: whose they are, who lives where, what is external, what is unmapped.

It is drawn from the records of an image, or from those of a live tree, which are the same. Every uid is
said as its holder sees it; where that is the overflow id, the picture says which id is behind it, in which
namespace it has a number, and which line of the map is next to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from pipeline.image.schema import Credentials, Extent, Id, Memberships, Namespace, UserNamespace
from pipeline.userns.forest import OVERFLOW_ID, Forest, IdKind


class Resident(Struct, frozen=True):
    """A process. `pids`: outermost first. `uid`, `gid`: effective ones, as it sees them itself."""

    pids: list[int]
    name: str
    uid: int
    gid: int


class Room(Struct, frozen=True):
    """A namespace of another kind than user. `pids`: its members' level-0 pids; `parent`: of a pid namespace."""

    index: int
    kind: str
    external: bool
    parent: int | None
    pids: list[int]


class House(Struct, frozen=True):
    """A user namespace, with the processes in it and the other namespaces that it owns.

    `owner`: the creator's uid as the parent knows it; `maps`: lines as ``inner lower count`` relative to the parent.
    """

    index: int
    parent: int | None
    owner: int | None
    uid_map: list[str]
    gid_map: list[str]
    setgroups: str
    residents: list[Resident]
    rooms: list[Room]


class UnmappedId(Struct, frozen=True):
    """An id that its holder sees as the overflow id, or not at all.

    `id` is its number in user namespace `namespace`; `nearest` the line of the holder's map that is next to it.
    """

    pid: int
    name: str
    what: str
    id: int
    namespace: int
    holder: int
    nearest: str


class Portrait(Struct, frozen=True):
    """All of them; `houses` with parents before their children."""

    houses: list[House]
    unmapped: list[UnmappedId]


class Sitter(Struct, frozen=True):
    """What is to be known of a process. `credentials`: ids in the forest."""

    pids: list[int]
    name: str
    namespaces: Memberships
    credentials: Credentials | None


def paint(
    user_namespaces: Iterable[UserNamespace], namespaces: Iterable[Namespace], sitters: Sequence[Sitter]
) -> Portrait:
    """The picture of a tree."""
    forest = Forest(user_namespaces)
    rooms = [_room(namespace, sitters) for namespace in namespaces]
    owners = {namespace.index: namespace.owner for namespace in namespaces}
    houses = []
    for index in sorted(forest.namespaces, key=lambda index: _way(forest, index)):
        record = forest.namespaces[index]
        houses.append(
            House(
                index=index,
                parent=record.parent,
                owner=_owner(forest, record),
                uid_map=list(map(_line, record.uid_map)),
                gid_map=list(map(_line, record.gid_map)),
                setgroups=record.setgroups,
                residents=[_resident(forest, s) for s in sitters if s.namespaces.user == index],
                rooms=[r for r in rooms if not r.external and owners[r.index] == index]
                if index
                else [r for r in rooms if r.external or owners[r.index] == 0],
            )
        )
    return Portrait(houses, [found for sitter in sitters for found in _unmapped(forest, sitter)])


def _way(forest: Forest, index: int) -> list[int]:
    """From the outermost namespace down: orders children behind their parents."""
    return list(forest.ancestors(index))[::-1]


def _line(extent: Extent) -> str:
    return f"{extent.inner} {extent.lower} {extent.count}"


def _owner(forest: Forest, record: UserNamespace) -> int | None:
    if record.owner is None or record.parent is None:
        return None
    return forest.number_in(record.owner, record.parent, "uid")


def _room(namespace: Namespace, sitters: Sequence[Sitter]) -> Room:
    members = [s.pids[0] for s in sitters if getattr(s.namespaces, namespace.kind) == namespace.index]
    return Room(namespace.index, namespace.kind, namespace.external, namespace.parent, members)


def _resident(forest: Forest, sitter: Sitter) -> Resident:
    def seen(ids: Sequence[Id], kind: IdKind) -> int:
        number = forest.number_in(ids[1], sitter.namespaces.user, kind)
        return OVERFLOW_ID if number is None else number

    if sitter.credentials is None:
        return Resident(sitter.pids, sitter.name, OVERFLOW_ID, OVERFLOW_ID)
    credentials = sitter.credentials
    return Resident(sitter.pids, sitter.name, seen(credentials.uids, "uid"), seen(credentials.gids, "gid"))


def _unmapped(forest: Forest, sitter: Sitter) -> Iterable[UnmappedId]:
    if sitter.credentials is None:
        return
    holder = sitter.namespaces.user
    names = ("real", "effective", "saved", "filesystem")
    wanted: list[tuple[str, IdKind, Id]] = [
        *((f"{name} uid", "uid", one) for name, one in zip(names, sitter.credentials.uids, strict=True)),
        *((f"{name} gid", "gid", one) for name, one in zip(names, sitter.credentials.gids, strict=True)),
        *(("supplementary group", "gid", one) for one in sitter.credentials.groups),
    ]
    told: set[tuple[IdKind, Id]] = set()
    for what, kind, one in wanted:
        if (kind, one) in told or forest.number_in(one, holder, kind) is not None:
            continue
        told.add((kind, one))
        near = _nearest(forest, one, holder, kind)
        yield UnmappedId(sitter.pids[0], sitter.name, what, one.id, one.ns, holder, near)


def _nearest(forest: Forest, wanted: Id, holder: int, kind: IdKind) -> str:
    """The line of the outermost map, on the way down to the holder, that the id does not get through."""
    way = _way(forest, holder)
    number = wanted.id
    for index in way[way.index(wanted.ns) + 1 :]:
        table = forest.map_of(index, kind)
        inner = table.down(number)
        if inner is None:
            near = table.inverse().nearest(number)
            return _line(Extent(near.lower, near.inner, near.count)) if near else "nothing is mapped"
        number = inner
    return ""
