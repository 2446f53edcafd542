"""Translating ids between namespaces: every `Id` of every record, found by its type.

Going out (dump), a record says `Id(0, host id)`; it leaves this stage saying the
innermost namespace, from its holder's own upwards, in which the id has a number.
Coming in (restore), it says a place in the forest; this stage asks whether the
destination can give that id, before anything is built.

Because ids are found by type and not by a list of fields, a new record cannot be
forgotten here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from pipeline.image.schema import Id, Process, Record

Change = Callable[[Id], Id]


def change_ids(value: Any, change: Change) -> Any:
    """A copy of `value` (records, lists, tuples of them) in which every `Id` went through `change`."""
    if isinstance(value, Id):
        return change(value)
    if isinstance(value, msgspec.Struct):
        changes = {}
        for name in value.__struct_fields__:
            old = getattr(value, name)
            if isinstance(old, msgspec.Struct | list | tuple):
                new = change_ids(old, change)
                if new is not old:
                    changes[name] = new
        return msgspec.structs.replace(value, **changes) if changes else value
    if isinstance(value, list | tuple):
        changed = [change_ids(item, change) for item in value]
        if all(new is old for new, old in zip(changed, value, strict=True)):
            return value
        return type(value)(changed)
    return value


def ids_of(value: Any) -> Iterator[Id]:
    """Every `Id` in a record."""
    if isinstance(value, Id):
        yield value
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from ids_of(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from ids_of(item)


def holder_of(record: Record) -> int | None:
    """The user namespace from which a record's ids are to be read; None where it has no holder of its own."""
    return record.namespaces.user if isinstance(record, Process) else None
