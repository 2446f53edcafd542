"""Drawing the namespaces of a tree for a person: who owns what, who lives where, and why an id is 65534."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeline.cli import render
from pipeline.userns.portrait import House, Portrait, Room, UnmappedId

if TYPE_CHECKING:
    from rich.tree import Tree

#: for files and pipes: no line is folded
_WIDE = 10_000


def as_document(portrait: Portrait) -> dict[str, Any]:
    """The picture as JSON: ``user-namespaces``, each with its members and what it owns, and ``unmapped``."""
    return {
        "user-namespaces": [render.plain(house) for house in portrait.houses],
        "unmapped": [render.plain(found) for found in portrait.unmapped],
    }


def draw(portrait: Portrait) -> None:
    """Print it on stdout; lines are folded for a terminal only."""
    from rich.console import Console
    from rich.tree import Tree

    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    nodes: dict[int | None, Tree] = {None: Tree("[bold]Namespaces[/]")}
    for house in portrait.houses:
        node = nodes[house.index] = nodes[house.parent].add(_house(house))
        for resident in house.residents:
            pids = " / ".join(map(str, resident.pids))
            node.add(
                f"[bold]{pids}[/] [cyan]{_escape(resident.name)}[/]  uid {resident.uid}, gid {resident.gid}"
            )
        for line in _rooms(house.rooms):
            node.add(line)
    console.print(nodes[None])
    for found in portrait.unmapped:
        console.print(_why(found))


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _house(house: House) -> str:
    if house.parent is None:
        return "[bold]user namespace 0[/]  external: the surroundings of the tree"
    facts = [f"uid {_map(house.uid_map)}"]
    if house.gid_map != house.uid_map:
        facts.append(f"gid {_map(house.gid_map)}")
    if house.setgroups == "deny":
        facts.append("setgroups denied")
    facts.append("made by an unmapped uid" if house.owner is None else f"made by uid {house.owner}")
    empty = "" if house.residents else "  (nobody lives in it)"
    return f"[bold]user namespace {house.index}[/]  {'  '.join(facts)}{empty}"


def _map(lines: list[str]) -> str:
    """The lines of a map as /proc shows them; long ones are cut."""
    most = 4
    if not lines:
        return "not mapped yet"
    shown = ", ".join(f"`{line}`" for line in lines[:most])
    return shown + (f" and {len(lines) - most} more lines" if len(lines) > most else "")


def _rooms(rooms: Iterable[Room]) -> Iterable[str]:
    """The other namespaces that a user namespace owns, or that are external, one line each."""
    rooms = list(rooms)
    external = [room for room in rooms if room.external]
    if external:
        yield f"external: {', '.join(room.kind for room in external)}"
    for room in rooms:
        if not room.external:
            inside = f" inside {room.parent}" if room.parent is not None and room.kind == "pid" else ""
            who = f"pid {', '.join(map(str, room.pids))}" if room.pids else "nobody"
            yield f"owns [green]{room.kind}[/] namespace {room.index}{inside}: {who}"


def _why(found: UnmappedId) -> str:
    where = "the surroundings" if found.namespace == 0 else f"user namespace {found.namespace}"
    near = (
        f"; the next line of the map is `{found.nearest}`"
        if found.nearest[:1].isdigit()
        else "; nothing is mapped"
    )
    return (
        f"[yellow]pid {found.pid} ({_escape(found.name)})[/]: its {found.what} shows as 65534 in user namespace "
        f"{found.holder}: it is {found.id} of {where}, which has no mapping there{near}"
    )
