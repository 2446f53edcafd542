"""The tables of the protocol: no way leads to two trees, whatever the order of messages."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import PeerError
from pipeline.transport import protocol
from pipeline.transport.protocol import (
    DESTINATION_SAYS,
    SOURCE_SAYS,
    Accept,
    Attend,
    Cancel,
    Commit,
    Completed,
    Conversation,
    Decision,
    Hello,
    Lacking,
    Message,
    Offer,
    Prepared,
    Refuse,
    Resume,
    Want,
    Whole,
)

HELLO = Hello(1, "x86_64", "6.18")
OFFER = Offer("0123456789abcdef", 10, 3)
MESSAGES: list[Message] = [
    HELLO,
    OFFER,
    Accept(),
    Refuse("no"),
    Prepared(),
    Commit(),
    Completed(7),
    Cancel("why"),
    Decision("0123456789abcdef", True),
    Attend("0123456789abcdef"),
    Resume("0123456789abcdef"),
    Lacking(3, [(0x1000, 0x7FFF_FFFF_F000)]),
    Want(3, 0x7FFF_FFFF_E000),
    Whole(),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Message):
    assert protocol.decode(protocol.encode(message)) == message


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        bytes((1 << 20) + 1),
        msgpack.packb({"type": "shutdown"}),
        msgpack.packb({"type": "offer", "migration": "short", "root": 1, "processes": 1}),
        msgpack.packb({"type": "accept", "surplus": 1}),
        msgpack.packb({"type": "refuse", "reason": "x" * 65537}),
    ],
    ids=["empty", "reserved", "large", "unknown", "short id", "surplus field", "long text"],
)
def test_a_message_that_is_none_of_ours_is_refused(content: bytes):
    with pytest.raises(PeerError):
        protocol.decode(content)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(content: bytes):
    try:
        message = protocol.decode(content)
    except PeerError:
        return
    assert isinstance(message, Message)


def test_a_whole_migration_is_allowed_on_both_sides():
    source, destination = Conversation("source"), Conversation("destination")
    script = [(True, HELLO), (False, HELLO), (True, OFFER), (False, Accept()), (False, Prepared())]
    for by_source, message in [*script, (True, Commit()), (False, Completed(1))]:
        speaker, listener = (source, destination) if by_source else (destination, source)
        speaker.said(message)
        listener.heard(message)
        assert source.state == destination.state
    assert source.state == "completed"


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(MESSAGES)), max_size=40))
def test_no_order_of_messages_runs_a_tree_that_was_not_committed(script: list[tuple[bool, Message]]):
    both = Conversation("source"), Conversation("destination")
    taken: list[tuple[bool, type[Message]]] = []
    for by_source, message in script:
        speaker, listener = both if by_source else both[::-1]
        try:
            speaker.said(message)
        except PeerError:
            with pytest.raises(PeerError):
                listener.heard(message)
            continue
        listener.heard(message)
        taken.append((by_source, type(message)))
        assert both[0].state == both[1].state
    if (False, Completed) in taken:
        decided = {(True, Commit), (True, Decision), (True, Resume)} & set(
            taken[: taken.index((False, Completed))]
        )
        assert decided
    if (True, Commit) in taken:
        assert (False, Prepared) in taken[: taken.index((True, Commit))]
        assert (True, Cancel) not in taken


@pytest.mark.parametrize("state", ["completed", "whole", "cancelled"])
def test_nothing_is_said_after_the_end(state: str):
    """But that no page is missing any more."""
    said = [key for table in (SOURCE_SAYS, DESTINATION_SAYS) for key in table if key[0] == state]
    assert said == ([("completed", Whole)] if state == "completed" else [])


def test_a_source_that_comes_back_hears_what_is_missing():
    source, destination = Conversation("source"), Conversation("destination")
    script = [
        (True, HELLO),
        (False, HELLO),
        (True, Resume("0123456789abcdef")),
        (False, Lacking(1, [(0, 4096)])),
    ]
    for by_source, message in [*script, (False, Completed(1)), (False, Whole())]:
        speaker, listener = (source, destination) if by_source else (destination, source)
        speaker.said(message)
        listener.heard(message)
    assert source.state == destination.state == "whole"


def test_the_source_cannot_take_back_a_commit():
    assert not [key for key in SOURCE_SAYS if key[0] == "committed"]


def test_only_a_prepared_tree_is_committed():
    assert {state for state, message in SOURCE_SAYS if message is Commit} == {"prepared"}


def test_the_diagram_in_the_documentation_is_current():
    text = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
    assert f"```mermaid\n{protocol.diagram()}```" in text
