"""What the two sides of a migration say to each other, as a table. Pure.

One tree, never two. The source decides, and its decision is an act: it ends its tree,
and then says ``Commit``. Before that, whatever goes wrong ends with the source running
and nothing at the destination. After it, the source never runs the tree again. A
destination that has said ``Prepared`` and hears nothing holds the tree stopped, *in
doubt*, until it is told: by the source, which comes back and says ``Decision``, or by a
person. It never guesses.

With post-copy memory of the tree lasts at the source when its processes have ended. The pages follow behind
``Completed`` on the same connection or, behind ``Resume``, on a new one; by ``Attend`` comes one more, on which single
pages are asked for. It ends with ``Whole``.

The tables below say who may send what in which state; anything else is a `PeerError`.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import ImageError, PeerError
from pipeline.image.codec import type_by_tag, unpack
from pipeline.image.schema import U64

VERSION = 8
_MAX_MESSAGE_BYTES = 1 << 20

Role = Literal["source", "destination"]
State = Literal[
    "fresh",
    "greeted",
    "offered",
    "active",
    "prepared",
    "committed",
    "completed",
    "whole",
    "attending",
    "serving",
    "resuming",
    "cancelling",
    "cancelled",
]
Text = Annotated[str, Meta(max_length=65536)]
#: ranges in one message
MAX_LACKING = 1 << 14
#: connections of one migration
Streams = Annotated[int, Meta(ge=1, le=16)]
MigrationId = Annotated[str, Meta(min_length=16, max_length=64)]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message, frozen=True, tag="hello"):
    """First word of both sides."""

    version: int
    machine: Text
    kernel: Text


class Offer(Message, frozen=True, tag="offer"):
    """The source would like to send a tree; records and pages follow an `Accept`."""

    migration: MigrationId
    root: int
    processes: int
    streams: Streams = 1
    #: it is sent while it runs: each part follows a `Begin`
    live: bool = False
    #: some pages come when it runs at the destination: an `Attend` follows on another connection
    later: bool = False


class Join(Message, frozen=True, tag="join"):
    """This is a further connection of a migration that was offered on another one; pages follow an `Accept`."""

    migration: MigrationId


class Begin(Message, frozen=True, tag="begin"):
    """What comes next of a tree that is sent while it runs.

    ``draft``: an image of it as it was a moment ago, to build from; one that came before is void. ``round``: pages
    that were written since. ``still``: records of it as it stands still now; behind them either ``rest``, further
    records and the pages that are lacking, or ``whole``, an image of it as it stands still, to be built anew.
    """

    what: Literal["draft", "round", "still", "rest", "whole"]
    #: how many there are, with ``still`` and ``rest``; those that are as in the draft are not sent again, but counted
    records: U64 = 0


class CatchUp(Message, frozen=True, tag="catch-up"):
    """All that came of a tree that is sent while it runs is to be taken in before anything else; then `CaughtUp`.

    The tree is not to stand still for what the destination has not done yet.
    """


class CaughtUp(Message, frozen=True, tag="caught-up"):
    """The draft is built, and all pages that came are where they belong."""


class Attend(Message, frozen=True, tag="attend"):
    """On this connection the destination asks for single pages of a migration, by `Want`; they are its answer."""

    migration: MigrationId


class Resume(Message, frozen=True, tag="resume"):
    """After a lost connection, when the source has ended its tree: which pages are missing still?

    The destination says so by `Lacking`, and then `Completed`; the pages follow. Or it says `Whole`.
    """

    migration: MigrationId


class Lacking(Message, frozen=True, tag="lacking"):
    """Pages of a space that the destination misses: [start, end), where they were left."""

    space: U64
    ranges: Annotated[list[tuple[U64, U64]], Meta(max_length=MAX_LACKING)]


class Want(Message, frozen=True, tag="want"):
    """Somebody waits for the page that was left at `address`."""

    space: U64
    address: U64


class Whole(Message, frozen=True, tag="whole"):
    """No page is missing any more: nothing at the source is needed."""


class Accept(Message, frozen=True, tag="accept"):
    """Go ahead."""


class Refuse(Message, frozen=True, tag="refuse"):
    """The destination cannot take the tree; the source runs on."""

    reason: Text


class Prepared(Message, frozen=True, tag="prepared"):
    """The tree stands complete at the destination, stopped."""


class Commit(Message, frozen=True, tag="commit"):
    """The source has ended its tree."""


class Completed(Message, frozen=True, tag="completed"):
    """The tree runs at the destination. `running_us`: for how long it has, when this is said."""

    root_pid: int
    running_us: Annotated[int, Meta(ge=0)] = 0


class Cancel(Message, frozen=True, tag="cancel"):
    """The source keeps its tree; the destination says `Refuse` when its own is gone."""

    reason: Text = ""


class Decision(Message, frozen=True, tag="decision"):
    """After a lost connection: what the source had decided about a migration in doubt."""

    migration: MigrationId
    committed: bool


AnyMessage = (
    Hello
    | Offer
    | Join
    | Attend
    | Resume
    | Accept
    | Begin
    | CatchUp
    | CaughtUp
    | Refuse
    | Prepared
    | Commit
    | Completed
    | Cancel
    | Decision
    | Lacking
    | Want
    | Whole
)

#: (state, message) -> state; messages of the source
SOURCE_SAYS: dict[tuple[State, type[Message]], State] = {
    ("fresh", Hello): "fresh",
    ("greeted", Offer): "offered",
    ("greeted", Join): "offered",
    ("greeted", Attend): "attending",
    ("greeted", Resume): "resuming",
    ("greeted", Decision): "committed",
    ("active", Begin): "active",
    ("active", CatchUp): "active",
    ("active", Cancel): "cancelling",
    ("prepared", Cancel): "cancelling",
    ("prepared", Commit): "committed",
}
#: messages of the destination
DESTINATION_SAYS: dict[tuple[State, type[Message]], State] = {
    ("fresh", Hello): "greeted",
    ("offered", Accept): "active",
    ("offered", Refuse): "cancelled",
    ("active", Refuse): "cancelled",
    ("active", CaughtUp): "active",
    ("active", Prepared): "prepared",
    ("prepared", Refuse): "cancelled",
    ("cancelling", Prepared): "cancelling",
    ("cancelling", Refuse): "cancelled",
    ("committed", Completed): "completed",
    ("committed", Refuse): "cancelled",
    ("completed", Whole): "whole",
    ("attending", Accept): "serving",
    ("attending", Refuse): "cancelled",
    ("serving", Want): "serving",
    ("resuming", Lacking): "resuming",
    ("resuming", Completed): "completed",
    ("resuming", Whole): "whole",
    ("resuming", Refuse): "cancelled",
}


def require_version(hello: Hello, peer: str) -> None:
    """Raise PeerError if the other side speaks another version."""
    if hello.version != VERSION:
        raise PeerError(
            f"{peer} speaks version {hello.version} of the protocol, and this side version {VERSION}: "
            "use the same version of the pipeline on both"
        )


class Conversation:
    """Where two sides are with each other, seen from either of them.

    Both sides keep one and tell it every message, in the order in which they were sent.
    """

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state: State = "fresh"

    def said(self, message: Message) -> None:
        """We send `message`; PeerError would be our own mistake."""
        self._step(message, ours=True)

    def heard(self, message: Message) -> None:
        """The peer sent `message`.

        Raises:
            PeerError: it may not be sent now.
        """
        self._step(message, ours=False)

    def _step(self, message: Message, ours: bool) -> None:
        by_source = (self.role == "source") == ours
        table = SOURCE_SAYS if by_source else DESTINATION_SAYS
        key = (self.state, type(message))
        if key not in table:
            who = "this side" if ours else "the other side"
            raise PeerError(f"{who} says {type(message).__name__} when the migration is {self.state}")
        self.state = table[key]


#: by their tags: see `pipeline.image.codec`
_KINDS: dict[object, type[AnyMessage]] = {kind.__struct_config__.tag: kind for kind in get_args(AnyMessage)}
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: Message) -> bytes:
    """A message as msgpack."""
    return _ENCODER.encode(message)


def decode(content: bytes) -> AnyMessage:
    """A message, typed and bounded.

    Raises:
        PeerError: it is none of ours.
    """
    if len(content) > _MAX_MESSAGE_BYTES:
        raise PeerError(f"a message of {len(content)} bytes")
    try:
        unpacked = unpack(content)
        message: AnyMessage = msgspec.convert(unpacked, type_by_tag(unpacked, _KINDS) or AnyMessage)
    except (ImageError, msgspec.ValidationError) as error:
        raise PeerError(f"a message that cannot be understood: {error}") from None
    return message


def diagram() -> str:
    """The tables as a Mermaid state diagram, for the documentation."""
    lines = ["stateDiagram-v2", "    [*] --> fresh"]
    for who, table in (("source", SOURCE_SAYS), ("destination", DESTINATION_SAYS)):
        lines += [f"    {a} --> {b}: {who} says {m.__name__}" for (a, m), b in table.items() if a != b]
    lines += [f"    {state} --> [*]" for state in ("completed", "whole", "serving", "cancelled")]
    return "\n".join(lines) + "\n"
