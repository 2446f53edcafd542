"""Translating ids between namespaces: every `Id` of every record, found by its type.

Going out (dump), a record says `Id(0, host id)`; it leaves this stage saying the
innermost namespace, from its holder's own upwards, in which the id has a number.
Coming in (restore), ids stay where they are: the forest's maps are what changes, and a
puppet sets the id that its own namespace knows.

Because ids are found by type and not by a list of fields, a new record cannot be
forgotten here. What a type says that it has no ids in is not looked through.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import msgspec

from pipeline.image.schema import AnyRecord, Credentials, Id, Process, Record
from pipeline.userns.forest import Forest, IdKind

#: translates an id, of the kind that its field is of
Change = Callable[[IdKind], Callable[[Id], Id]]
_GROUP_FIELDS = frozenset({"gid", "gids", "groups"})
_NAME = re.compile(r"\w+")


def prepare(states: Iterable[type[msgspec.Struct]]) -> None:
    """Look through the types of records, and of the `states` of open files: before a tree stands still."""
    for kind in (*get_args(AnyRecord), *states):
        _fields_with_ids(kind)


@functools.cache
def _fields_with_ids(kind: type[msgspec.Struct]) -> list[tuple[str, IdKind]]:
    """The fields of a type that may hold ids, at whatever depth, and of which kind these are.

    To have all annotations evaluated takes ten times as long as to look up the names in them.
    """
    found: list[tuple[str, IdKind]] = []
    for base in kind.__mro__:
        scope = vars(sys.modules[base.__module__])
        for name, text in getattr(base, "__annotations__", {}).items():
            hints = [scope[word] for word in _NAME.findall(text) if word in scope]
            if any(_may_be_id(part) for hint in hints for part in _parts(hint)):
                found.append((name, "gid" if name in _GROUP_FIELDS else "uid"))
    return found


def _parts(hint: Any) -> Iterator[Any]:
    """A type, and the types that it is made of."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def _may_be_id(kind: Any) -> bool:
    if kind is Any:
        return True
    if not isinstance(kind, type):
        return False
    return issubclass(kind, Id) or (issubclass(kind, msgspec.Struct) and bool(_fields_with_ids(kind)))


def change_ids(value: Any, change: Change, kind: IdKind = "uid") -> Any:
    """A copy of `value` (records, lists, tuples of them) in which every `Id` was translated.

    Whether an id is a uid or a gid is said by the name of its field.
    """
    if isinstance(value, Id):
        return change(kind)(value)
    if isinstance(value, msgspec.Struct):
        changes = {}
        for name, field in _fields_with_ids(type(value)):
            old = getattr(value, name)
            new = change_ids(old, change, field) if old else old
            if new is not old:
                changes[name] = new
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, list | tuple):
        changed = [change_ids(item, change, kind) for item in value]
        if all(map(operator.is_, changed, value)):
            return value
        return type(value)(changed)
    return value


def holder_of(record: Record) -> int | None:
    """The user namespace from which a record's ids are to be read; None where it has no holder of its own."""
    return record.namespaces.user if isinstance(record, Process) else None


def in_forest(found: Credentials, holder: int, forest: Forest) -> Credentials:
    """The ids of a task, said in the innermost namespace from `holder` upwards."""
    moved: Credentials = change_ids(
        found, lambda kind: lambda one: one if one.ns else forest.innermost(one.id, holder, kind)
    )
    return moved


def into_forest(record: Record, state: Record | None, forest: Forest) -> Record:
    """A captured record with every id moved into the forest of the image.

    Args:
        record: ids say `Id(0, id as the pipeline sees it)`.
        state: the record of an open file's kind; it becomes `OpenFile.state`.
        forest: of the tree.
    """
    holder = holder_of(record)

    def change(field: IdKind) -> Callable[[Id], Id]:
        def innermost(found: Id) -> Id:
            if found.ns:
                return found
            if holder is not None:
                return forest.innermost(found.id, holder, field)
            return forest.at_a_root(found, field)

        return innermost

    translated = change_ids(record, change)
    if state is not None:
        kind_state = msgspec.to_builtins(change_ids(state, change), builtin_types=(bytes,))
        translated = msgspec.structs.replace(translated, state=kind_state)
    result: Record = translated
    return result
