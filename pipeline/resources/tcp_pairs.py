"""Both ends of a connection within the tree, which were read one after the other: do they fit together?

Between two looks a segment may have arrived. Of two ends that fit together, the one knows exactly what the other has
received: nothing is on its way any more, what was is to be sent.
"""

from __future__ import annotations

from msgspec.structs import replace

from pipeline.resources.tcp_state import FIN_RECEIVED, FIN_SENT, Connection, State

_WRAP = 1 << 32


def agree(one: Connection, other: Connection) -> tuple[Connection, Connection] | None:
    """Both ends, each knowing what the other has received; None if they were not read at one moment."""
    first = _acknowledged(one, other)
    second = _acknowledged(other, one)
    return None if first is None or second is None else (first, second)


def _acknowledged(sender: Connection, receiver: Connection) -> Connection | None:
    data = sender.sent + sender.unsent
    arrived = (receiver.received_end - sender.acknowledged_end) % _WRAP
    if arrived > len(data):
        return None
    fin_arrived = receiver.state in FIN_RECEIVED
    if fin_arrived and (sender.state not in FIN_SENT or arrived < len(data)):
        return None
    if sender.state == State.FIN_WAIT2 and not fin_arrived:
        return None
    state = sender.state
    if state == State.FIN_WAIT1 and fin_arrived:
        state = State.FIN_WAIT2
    window = replace(sender.window, snd_wnd=max(0, sender.window.snd_wnd - arrived))
    return replace(sender, state=state, sent=b"", unsent=data[arrived:], window=window)
