"""Show what an image holds: the tree, its namespaces with their maps, files, memory and sizes.

The whole image is read and every checksum verified; nothing is rebuilt or run.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from pipeline import amounts
from pipeline.cli import forest, render
from pipeline.kernel.pagemap import total_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table
    from rich.tree import Tree

    from pipeline.image.codec import Image
    from pipeline.image.schema import Extent, OpenFile, Process
    from pipeline.inspect import Inspection

EXAMPLE = (
    "  python -m pipeline inspect image\n"
    "  python -m pipeline inspect image --namespaces\n"
    "  python -m pipeline inspect image --json | python -m json.tool | less"
)

#: how many holders of an open file are named before the rest is counted
_MOST_HOLDERS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", metavar="IMAGE", help="a directory, a URL, or - for stdin")
    parser.add_argument(
        "--namespaces",
        action="store_true",
        help="only the namespaces: their owners, maps and members, what is external, and which ids are unmapped",
    )
    parser.add_argument("--json", action="store_true", help="everything, as one JSON document on stdout")


def execute(arguments: argparse.Namespace) -> int:
    import pipeline
    from pipeline.cli import recipe

    inspection = recipe.run(lambda: pipeline.inspect(arguments.image))
    if arguments.json:
        picture = forest.as_document(inspection.portrait())
        render.document(picture if arguments.namespaces else as_document(inspection))
    elif arguments.namespaces:
        forest.draw(inspection.portrait())
    else:
        from rich.console import Console

        show(inspection, arguments.image, Console(highlight=False))
    return 0


def as_document(inspection: Inspection) -> dict[str, Any]:
    """The whole image as JSON knows it; page contents are not part of it."""
    from pipeline.resources.given_ends import external_ends

    image = inspection.image
    return {
        "head": render.plain(image.head),
        "user-namespaces": render.plain(list(image.user_namespaces.values())),
        "namespaces": render.plain(list(image.namespaces.values())),
        "processes": render.plain(list(image.processes.values())),
        "address-spaces": render.plain(list(image.spaces.values())),
        "cgroups": render.plain(list(image.cgroups.values())),
        "mapped-files": render.plain(list(image.mapped_files.values())),
        "taken-files": render.plain(list(image.taken_files.values())),
        "shared-memory": render.plain(list(image.shared_memory.values())),
        "contents": render.plain(list(image.contents.values())),
        "files": render.plain(list(image.files.values())),
        "external-ends": render.plain(external_ends(image)),
        "layers": render.plain(list(image.layers.values())),
        "stored": render.plain(list(image.stored.values())),
        "page-bytes": {str(space): count for space, count in inspection.page_bytes.items()},
        "image-bytes": inspection.image_bytes,
        "index-bytes": inspection.index_bytes,
    }


def show(inspection: Inspection, name: str, console: Console) -> None:
    """Print it for a person."""
    image, carried = inspection.image, inspection.page_bytes
    _heading(inspection, name, console)
    console.print(_process_tree(image, carried))
    console.print(_user_namespace_tree(image))
    tables = (
        _namespaces(image),
        _memory(image, carried),
        _files(image),
        _taken(image),
        _external_ends(image),
    )
    for table in tables:
        if table.row_count:
            console.print()
            console.print(table)


def _heading(inspection: Inspection, name: str, console: Console) -> None:
    from datetime import UTC, datetime

    from rich.markup import escape

    image = inspection.image
    head = image.head
    made = datetime.fromtimestamp(head.created_ns / 1e9, UTC)
    console.print(
        f"[bold]{escape(name)}[/]: format {head.version}, {head.machine}, Linux {escape(head.kernel)}"
    )
    console.print(f"made {made:%Y-%m-%d %H:%M:%S} UTC")
    threads = sum(len(process.threads) for process in image.processes.values())
    carried = amounts.size(sum(inspection.page_bytes.values()))
    index = (
        f", index: {amounts.size(inspection.index_bytes)}" if inspection.index_bytes else ", without an index"
    )
    console.print(
        f"{_many(len(image.processes), 'process', 'processes')}, {_many(threads, 'thread')}, "
        f"{_many(len(image.files), 'open file')}, pages: {carried}, image: {amounts.size(inspection.image_bytes)}"
        f"{index}"
    )
    for layer in image.layers.values():
        inside = sum(total_bytes(one.runs) for one in image.stored.values() if one.layer == layer.index)
        console.print(
            f"{amounts.size(inside)} of the pages are in {escape(layer.at or name)}: {escape(layer.name)}"
        )
    console.print()


def _many(count: int, one: str, more: str = "") -> str:
    return f"{count} {one if count == 1 else more or one + 's'}"


def _text(value: bytes) -> str:
    from rich.markup import escape

    return escape(value.decode("utf-8", "backslashreplace"))


def _process_tree(image: Image, carried: Mapping[int, int]) -> Tree:
    from rich.tree import Tree

    top = Tree("[bold]Processes[/]")
    nodes: dict[int, Tree] = {}
    for pid, process in image.processes.items():
        nodes[pid] = nodes.get(process.parent, top).add(_process_line(process, carried))
    return top


def _process_line(process: Process, carried: Mapping[int, int]) -> str:
    pids = " / ".join(map(str, process.pids))
    name = _text(process.threads[0].comm if process.threads else process.comm)
    facts = []
    if process.threads:
        credentials = process.threads[0].credentials
        owner = credentials.uids[1]
        shift = "" if owner.ns == process.namespaces.user else f" of user namespace {owner.ns}, unmapped here"
        facts.append(f"uid {owner.id}{shift}")
        if process.namespaces.user:
            facts.append(f"user namespace {process.namespaces.user}")
        if len(process.threads) > 1:
            facts.append(f"{len(process.threads)} threads")
        facts.append(_many(len(process.fds), "fd"))
    if process.space is not None:
        facts.append(amounts.size(carried.get(process.space, 0)))
    if process.state != "running":
        facts.append(process.state)
    return f"[bold]{pids}[/] [cyan]{name}[/]  {', '.join(facts)}"


def _user_namespace_tree(image: Image) -> Tree:
    from rich.tree import Tree

    members = Counter(process.namespaces.user for process in image.processes.values())
    nodes: dict[int | None, Tree] = {None: Tree("\n[bold]User namespaces[/]")}
    waiting = dict(image.user_namespaces)
    while waiting:
        ready = [index for index, record in waiting.items() if record.parent in nodes]
        if not ready:
            break
        for index in ready:
            record = waiting.pop(index)
            label = f"[bold]{index}[/]" + (
                "  external: the destination's own" if record.parent is None else ""
            )
            if record.parent is not None:
                label += f"  uid {_map(record.uid_map)}"
                if record.gid_map != record.uid_map:
                    label += f"  gid {_map(record.gid_map)}"
                if record.setgroups == "deny":
                    label += "  setgroups denied"
                if record.owner is not None:
                    label += f"  made by uid {record.owner.id}"
            label += f"  ({_many(members[index], 'process', 'processes')})"
            nodes[index] = nodes[record.parent].add(label)
    return nodes[None]


def _map(extents: Sequence[Extent]) -> str:
    if not extents:
        return "not mapped"
    return ", ".join(
        f"{e.inner} -> {e.lower}" if e.count == 1 else f"{e.inner}-{e.inner + e.count - 1} -> {e.lower}"
        for e in extents
    )


def _table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def _namespaces(image: Image) -> Table:
    table = _table("Other namespaces", "index", "kind", "owner", "parent", "state", numbers=["index"])
    for record in image.namespaces.values():
        if record.external:
            continue
        parent = "" if record.parent is None else str(record.parent)
        table.add_row(
            str(record.index), record.kind, f"user namespace {record.owner}", parent, _facts(record.state)
        )
    return table


def _memory(image: Image, carried: Mapping[int, int]) -> Table:
    table = _table(
        "Memory",
        "pid",
        "executable",
        "mappings",
        "size",
        "carried",
        "shares",
        numbers=["mappings", "size", "carried"],
    )
    for process in image.processes.values():
        if process.space is None:
            continue
        space = image.spaces[process.space]
        mapped = [vma for vma in space.vmas if vma.kind in {"anon", "file", "shared"}]
        table.add_row(
            str(process.pids[0]),
            _text(image.mapped_files[space.exe].path.path),
            str(len(mapped)),
            amounts.size(sum(vma.end - vma.start for vma in mapped)),
            amounts.size(carried.get(process.space, 0)),
            "" if space.copy_of is None else f"pages of space {space.copy_of}",
        )
    for memory in image.shared_memory.values():
        name = f"{memory.kind} {_text(memory.name)}".strip()
        size, sent = amounts.size(memory.size_bytes), amounts.size(carried.get(memory.space, 0))
        table.add_row("shared", name, "", size, sent, "")
    return table


def _external_ends(image: Image) -> Table:
    from pipeline.resources.given_ends import external_ends

    table = _table("Ends outside of the tree, which a restore is given", "name", "held by pid:fd")
    for name, holders in external_ends(image).items():
        table.add_row(_text(os.fsencode(name)), " ".join(f"{pid}:{fd}" for pid, fd in holders))
    return table


def _files(image: Image) -> Table:
    holders: dict[int, list[str]] = {}
    for process in image.processes.values():
        for entry in process.fds:
            holders.setdefault(entry.file, []).append(f"{process.pids[0]}:{entry.fd}")
    table = _table("Open files", "index", "kind", "what", "held by pid:fd", numbers=["index"])
    for index, record in image.files.items():
        names = holders.get(index, ["a message in a socket"])
        more = len(names) - _MOST_HOLDERS
        held = " ".join(names[:_MOST_HOLDERS]) + (f" and {more} more" if more > 0 else "")
        table.add_row(str(index), record.kind, _what(record), held)
    return table


def _taken(image: Image) -> Table:
    table = _table(
        "Files that came along", "name", "size", "mode", "uid", "gid", numbers=["size", "uid", "gid"]
    )
    for record in image.taken_files.values():
        size, owner = amounts.size(record.identity.size_bytes), record.owner
        mode = f"{owner.mode:04o}"
        table.add_row(_text(record.path.path), size, mode, str(owner.uid.id), str(owner.gid.id))
    return table


def _what(record: OpenFile) -> str:
    """What a person wants to know of an open file: its name first, then the plain facts of its kind."""
    state = dict(record.state)
    facts = [_brief(state.pop(key)) for key in ("path", "link", "name", "local") if state.get(key)]
    if state.pop("backlog", None) is not None:
        facts.append("listening")
    if (peer := state.pop("peer", None)) is not None:
        facts.append(f"paired with {peer}")
    if state.pop("pipe", record.index) != record.index:
        facts.append(f"other end of {record.state['pipe']}")
    facts += [
        f"{key} {_brief(value)}"
        for key, value in state.items()
        if value and isinstance(value, int | str) and not isinstance(value, bool) and key != "mode"
    ][:3]
    if record.position:
        facts.append(f"at {record.position}")
    return ", ".join(facts)


def _facts(state: Mapping[str, object]) -> str:
    """The fields of a namespace's state that say something."""
    return ", ".join(f"{key} {_brief(value)}" for key, value in state.items() if value)


def _brief(value: object) -> str:
    """One field of a state, short."""
    from rich.markup import escape

    if isinstance(value, bytes):
        return _text(value)
    if isinstance(value, Mapping):
        return _brief(value["path"]) if "path" in value else _many(len(value), "entry", "entries")
    if isinstance(value, list | tuple):
        match value:
            case [int(), bytes() as path]:  # a path in a mount namespace
                return _text(path)
            case [bytes() as host, int() as port, *_] if len(host) in {4, 16}:  # an internet address
                return f"{ip_address(host)}:{port}"
            case _:
                return _many(len(value), "entry", "entries")
    return escape(str(value))
