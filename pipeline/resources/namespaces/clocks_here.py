"""Whether the clocks of a tree go on where it is rebuilt, and a time namespace around it where they would not.

CLOCK_MONOTONIC and CLOCK_BOOTTIME count from the boot of a host, plus the offsets of a time namespace. A tree that
shares the time namespace of its surroundings would see them jump, backwards too, when it moves to another boot or into
other surroundings. So it gets a time namespace then (`--clocks auto`), whose clocks go on from what they said when it
was captured; always (`keep`), or never (`host`).

It is made before the first process, by a puppet in the user namespace that all of the tree's namespaces are made in: a
plain user's own one, too. It cannot be made by who lacks CAP_SYS_ADMIN or CAP_SYS_TIME there (a container that was
given neither), nor on a kernel without time namespaces. Then, and with `host`, the clocks are those of this host:
timers and sleeps for a span go on with the time they had left, and the rebuild says so in a note. A program that has
kept a time of these clocks in its memory, or sleeps until one, sees the jump.

Source: time_namespaces(7), setns(2); kernel/time/namespace.c.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from pipeline.errors import RebuildError
from pipeline.image.schema import Head, Memberships
from pipeline.kernel.syscalls import CLONE
from pipeline.policy import Clocks as Wish
from pipeline.remote.puppet import Puppet
from pipeline.resources.namespaces import clocks
from pipeline.resources.namespaces.seats import join

_NS_IN_S = 1_000_000_000
#: clock number -> its name in a time namespace; CLOCK_BOOTTIME_ALARM is CLOCK_BOOTTIME
_NAMES = {time.CLOCK_MONOTONIC: "monotonic", time.CLOCK_BOOTTIME: "boottime", 9: "boottime"}


class ClocksHere:
    """The clocks of a tree's surroundings, as it saw them and as it will see them here.

    Args:
        head: of the image.
        wish: see `RestorePolicy`.
        external: the `Namespace` index of the external time namespace.
        members: the namespaces of each process that lives.
    """

    def __init__(self, head: Head, wish: Wish, external: int, members: Iterable[Memberships]) -> None:
        self._head = head
        self._wish = wish
        self._concerned = any(external in (m.time, m.time_for_children) for m in members)
        self._ahead: dict[str, int] | None = (
            {"monotonic": 0, "boottime": 0} if self._go_on_by_themselves() else None
        )
        #: what is not as it was
        self.notes: list[str] = []

    def _go_on_by_themselves(self) -> bool:
        ours = clocks.own_offsets_ns()
        offsets = (ours["monotonic"], ours["boottime"])
        same = (self._head.boot_id, self._head.clock_offsets_ns) == (clocks.boot_id(), offsets)
        return same and bool(self._head.boot_id)

    def go_on(self, launcher: Puppet) -> None:
        """Move `launcher`, and with it the whole tree, into a time namespace, where that is wanted.

        Raises:
            RebuildError: it shall be made, and the kernel refuses it.
        """
        if not self._concerned or (self._wish == "auto" and self._ahead is not None):
            return
        if self._wish == "host":
            if self._ahead is None:
                self._note("as --clocks host wants it")
            return
        state = clocks.TimeState(monotonic=self._head.monotonic_ns, boottime=self._head.boottime_ns)
        keeper = launcher.clone(CLONE.PARENT)
        try:
            ahead = clocks.begin(state, keeper)
            join(launcher, keeper, "time")
        except (OSError, RebuildError) as error:
            if self._wish == "keep":
                raise RebuildError(
                    f"the clocks of the tree cannot be kept (--clocks keep): no time namespace can be made: {error}"
                ) from error
            self._note(f"no time namespace can be made ({error})")
        else:
            self._ahead = ahead
        finally:
            keeper.kill_and_reap()

    def _note(self, why: str) -> None:
        jump = (time.clock_gettime_ns(time.CLOCK_MONOTONIC) - self._head.monotonic_ns) / _NS_IN_S
        self.notes.append(
            f"CLOCK_MONOTONIC of the tree jumps by {jump:+.0f} s, {why}: timers and sleeps for a span keep the time "
            "they had left, absolute times mean the clock of this host"
        )

    def tree_ns(self, clock: int) -> int | None:
        """What a clock of the tree's surroundings says now to the tree; None where it does not go on here."""
        if self._ahead is None or clock not in _NAMES:
            return None
        plain = time.CLOCK_BOOTTIME if _NAMES[clock] == "boottime" else time.CLOCK_MONOTONIC
        return time.clock_gettime_ns(plain) + self._ahead[_NAMES[clock]]
