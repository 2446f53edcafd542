"""The records of pseudo-terminals: one of each open file, and the state of a pair with its master."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from pipeline.image.schema import U32, Id, Index, PathRef, Pid, Record
from pipeline.resources.pty_sides import Role
from pipeline.resources.terminal_bytes import UnderWay

KIND_NAME = "pty"


class Node(Record, frozen=True, kw_only=True):
    """The file /dev/pts/N."""

    path: PathRef
    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    uid: Id
    gid: Id


class Terminal(Record, frozen=True, kw_only=True):
    """State of a pair, recorded with its master.

    `settings`: struct termios2. `window`: struct winsize. `left`: every slave was closed, the master reads EIO.
    `session`: level-0 pid of the leader, 0 if none; `foreground`: the group's number inside the leader's
    own pid namespace; `without`: level-0 pids of members of the session that have laid it off.
    `under_way`: what waits on both sides.
    """

    settings: Annotated[bytes, Meta(min_length=44, max_length=44)]
    window: Annotated[bytes, Meta(min_length=8, max_length=8)]
    packet_mode: bool
    locked: bool
    exclusive: bool
    slave_exclusive: bool
    left: bool
    session: Pid = 0
    foreground: Pid = 0
    without: Annotated[list[Pid], Meta(max_length=1 << 22)] = []
    under_way: UnderWay = UnderWay()
    node: Node | None = None


class PtyState(Record, frozen=True, kw_only=True):
    """One open file of a terminal.

    `master`: the open file that stands for the pair (itself for a master; None for role ``hung-up``).
    `ptmx`: what to open for a new pair. `path`: /dev/tty for role ``tty``, and
    `leader` the leader of the session whose terminal that is. `terminal`: of a master only.
    """

    role: Role
    number: U32
    ptmx: PathRef
    master: Index | None = None
    path: PathRef | None = None
    leader: Pid = 0
    terminal: Terminal | None = None
