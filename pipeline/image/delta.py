"""What a later look at a tree has in common with its draft: said by number, instead of sent again. Pure.

While the tree stands still, each of its records is encoded, sent, decoded and checked; most of them the destination has
from the draft. Both sides number the records of the draft alike: in the order in which they were sent.

What the memory of a process had in common with its parent's mattered when it was made: a later look does not say it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec.structs import replace

from pipeline.errors import ImageError
from pipeline.image.codec import Image, key_of
from pipeline.image.schema import AddressSpace, Record, Unchanged


def grown(record: Record) -> Record:
    """A record of a draft, as a later look says it of what has not changed since."""
    if isinstance(record, AddressSpace) and (record.copy_of is not None or record.dropped):
        return replace(record, copy_of=None, dropped=[])
    return record


class Draft:
    """The records of an earlier look at a tree, as both sides have them.

    Args:
        image: them; what is changed in it later does not count.
    """

    def __init__(self, image: Image) -> None:
        self._records = list(map(grown, image.records()))
        self._numbers = {(type(record), key_of(record)): n for n, record in enumerate(self._records)}

    def known(self, record: Record) -> tuple[Record, int | None]:
        """A record of a later look: the one of the draft and its number, if they are the same; else itself."""
        number = self._numbers.get((type(record), key_of(record)))
        if number is None or self._records[number] != record:
            return record, None
        return self._records[number], number

    def expanded(self, record: Record) -> list[Record]:
        """The records that one stands for.

        Raises:
            ImageError: the draft does not have them.
        """
        if not isinstance(record, Unchanged):
            return [record]
        end = record.first + record.count
        if end > len(self._records):
            raise ImageError(
                f"records up to {end} of a draft are said to be unchanged, which has {len(self._records)}"
            )
        return self._records[record.first : end]


def condensed(records: Iterable[tuple[Record, int | None]]) -> Iterator[Record]:
    """What to send of records with their numbers in the draft, which have one where they are unchanged."""
    first = count = 0
    for record, number in records:
        if number is not None and count and number == first + count:
            count += 1
            continue
        if count:
            yield Unchanged(first=first, count=count)
        first, count = (0, 0) if number is None else (number, 1)
        if number is None:
            yield record
    if count:
        yield Unchanged(first=first, count=count)
