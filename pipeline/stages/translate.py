"""Translating ids between namespaces: every `Id` of every record, found by its type.

Going out (dump), a record says `Id(0, host id)`; it leaves this stage saying the
innermost namespace, from its holder's own upwards, in which the id has a number.
Coming in (restore), ids stay where they are: the forest's maps are what changes, and a
puppet sets the id that its own namespace knows.

Because ids are found by type and not by a list of fields, a new record cannot be
forgotten here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import msgspec

from pipeline.image.schema import Credentials, Id, Process, Record
from pipeline.userns.forest import Forest, IdKind

#: translates an id, of the kind that its field is of
Change = Callable[[IdKind], Callable[[Id], Id]]
#: as tuples: thousands of values are looked at while a tree stands still
_LISTS, _PLAIN = (list, tuple), (int, bytes, str)
_NESTED = (msgspec.Struct, *_LISTS)
_GROUP_FIELDS = frozenset({"gid", "gids", "groups"})


def change_ids(value: Any, change: Change, kind: IdKind = "uid") -> Any:
    """A copy of `value` (records, lists, tuples of them) in which every `Id` was translated.

    Whether an id is a uid or a gid is said by the name of its field.
    """
    if isinstance(value, Id):
        return change(kind)(value)
    if isinstance(value, msgspec.Struct):
        changes = {}
        for name in value.__struct_fields__:
            old = getattr(value, name)
            if old and isinstance(old, _NESTED):
                new = change_ids(old, change, "gid" if name in _GROUP_FIELDS else "uid")
                if new is not old:
                    changes[name] = new
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, _LISTS):
        if not value or isinstance(value[0], _PLAIN):
            return value
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
