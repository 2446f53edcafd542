"""The options of all sockets of a tree that stands still, read by another process while they are checked.

Some ninety system calls for each are nearly a quarter of the look at a connection. That is done by the child of the
`Shield`, where it is there already and there are sockets enough. If we are killed meanwhile, it has the sockets until
it has read them: some milliseconds for each hundred.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import cached_property

import msgpack

from pipeline.errors import ChildKilled, raise_if_exhausted
from pipeline.ids import LocalFd
from pipeline.resources import socket_options
from pipeline.resources.kinds import CaptureScope, FdView
from pipeline.resources.socket_identity import Identity
from pipeline.resources.socket_options import Values

#: to ask costs something, too
_MANY = 8


class OptionsAhead:
    """See the module; one for each capture, by `of`, which begins with it where that is worth it.

    Args:
        scope: of the capture.
    """

    def __init__(self, scope: CaptureScope) -> None:
        self._shield = scope.shield
        sockets = [(view.local, who) for _, view in scope.files() if (who := view.identity) is not None]
        self._asked: Sequence[LocalFd] = ()
        # of a tree that runs nothing is captured
        if scope.still and len(sockets) >= _MANY:
            asked = [local for local, _ in sockets]
            if self._shield.begin(_read, asked, [who for _, who in sockets]):
                self._asked = asked

    @classmethod
    def of(cls, scope: CaptureScope) -> OptionsAhead:
        """That of a capture."""
        known: OptionsAhead | None = scope.peers().get("options")
        if known is None:
            known = scope.peers()["options"] = cls(scope)
        return known

    def capture(self, view: FdView, sock: socket.socket) -> Values:
        """As `socket_options.capture`, each once."""
        values = self._found.pop(view.local, None)
        assert view.identity is not None
        return values if values is not None else socket_options.capture(sock, view.identity)

    @cached_property
    def _found(self) -> dict[LocalFd, Values]:
        if not self._asked:
            return {}
        try:
            packed = msgpack.unpackb(self._shield.end(), use_list=False)
        except ChildKilled:
            return {}
        except OSError as error:
            raise_if_exhausted(error)
            return {}  # of whom it tells is found when it is asked again
        return dict(zip(self._asked, socket_options.unpacked(packed), strict=True))


def _read(locals_: list[LocalFd], identities: Sequence[Identity]) -> bytes:
    """In the child."""
    found = socket_options.capture_all(list(zip(locals_, identities, strict=True)))
    packed: bytes = msgpack.packb(found)
    return packed
