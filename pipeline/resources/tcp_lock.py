"""Connections with a peer outside of the tree are locked while it stands still: not a packet passes, either way.

A peer whose segments are lost sends them again; one whose segments are answered by nobody's socket is told RST, and
one whose segments are acknowledged by a socket that was read already loses them. So a table of packet filter rules
drops exactly these connections' packets before they are read, in the network that they belong to.

- While the tree is looked at, the table is owned by a netlink socket of ours (`pipeline.kernel.nfnetlink`): whatever
  becomes of us, SIGKILL too, the kernel takes the table away with the socket, and the connections go on.
- When the tree has ended, a second table that nobody owns takes its place, until the one who restores the tree
  there takes it away (`unlock`). In a network of the tree's own it ends with the network. In the network around it,
  it stays while the image waits: `python -m pipeline clean` leaves it while that image is there, and deletes it
  otherwise.

Source: nft(8); pipeline/kernel/nfnetlink.py.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.kernel import nfnetlink
from pipeline.kernel.nfnetlink import Ends, Listener
from pipeline.ledger import LEDGER
from pipeline.leftovers import notes_directory

_ENTRY = "lock of connections"
_LOOKING, _KEPT = "pipeline-looking-", "pipeline-kept-"
#: what an image may call a lock
NAME = re.compile(r"[0-9a-f]{16}")


class Lock:
    """The locked connections of one network; `keep` or `close` ends it.

    Args:
        name: of the lock, which `unlock` is told.
        made: makes a socket in the network.
        ends: of the connections.
        listeners: nobody new may come to.
        outlives: the network is not the tree's own, and stays when that has ended.

    Raises:
        OSError: the kernel does not make the table; nothing is left.
    """

    def __init__(
        self,
        name: str,
        made: Callable[[Callable[[], socket.socket]], socket.socket],
        ends: Sequence[Ends],
        listeners: Sequence[Listener],
        outlives: bool,
    ) -> None:
        self._name = name
        self._ends = ends
        self._listeners = listeners
        self._outlives = outlives
        self._sock = made(nfnetlink.open_socket)
        LEDGER.take(_ENTRY, id(self))
        try:
            nfnetlink.make_lock(self._sock, _LOOKING + name, ends, listeners, owned=True)
        except BaseException:
            self.close()
            raise

    def keep(self, image: str) -> None:
        """Keep it locked behind our own end. In a network that stays, only connections: they alone come back there.

        Args:
            image: where the image is that waits for them; empty where nobody can say.

        Raises:
            OSError: the kernel does not make the table.
        """
        if self._outlives and not self._ends:
            return
        listeners = () if self._outlives else self._listeners
        nfnetlink.make_lock(self._sock, _KEPT + self._name, self._ends, listeners, owned=False)
        folder = notes_directory()
        if self._outlives and folder is not None:
            with suppress(OSError):
                (folder / f"{_KEPT}{self._name}.image").write_text(json.dumps(image), encoding="utf-8")

    def forget(self) -> None:
        """Take away what `keep` has made. OSError: the kernel does not."""
        if self._outlives:
            _delete(self._sock, self._name)

    def close(self) -> None:
        """The owned table ends with its socket. To be called once."""
        self._sock.close()
        LEDGER.give_back(_ENTRY, id(self))


def unlock(name: str) -> None:
    """Take away the lock `name` from the caller's network, if it was kept there. OSError: the kernel does not."""
    with nfnetlink.open_socket() as sock:
        _delete(sock, name)


def _delete(sock: socket.socket, name: str) -> None:
    nfnetlink.delete_table(sock, _KEPT + name)
    folder = notes_directory()
    if folder is not None:
        with suppress(OSError):
            (folder / f"{_KEPT}{name}.image").unlink(missing_ok=True)


class Swept(NamedTuple):
    """What became of one kept lock."""

    table: str
    removed: bool
    reason: str


def sweep() -> list[Swept]:
    """Take away the locks in the caller's network that no image waits for."""
    found: list[Swept] = []
    with nfnetlink.open_socket() as sock:
        try:
            tables = nfnetlink.tables(sock)
        except OSError:  # no nftables, or not ours to ask
            return []
        for table in tables:
            name = table.removeprefix(_KEPT)
            if name == table or not NAME.fullmatch(name):
                continue
            image = _image_of(name)
            if image and os.path.exists(image):
                found.append(Swept(table, False, f"its connections wait for the restore of {image}"))
                continue
            try:
                _delete(sock, name)
            except OSError as error:
                found.append(Swept(table, False, error.strerror or str(error)))
            else:
                found.append(Swept(table, True, "no image waits for its connections"))
    return found


def _image_of(name: str) -> str:
    folder = notes_directory()
    if folder is None:
        return ""
    try:
        image = json.loads((folder / f"{_KEPT}{name}.image").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return image if isinstance(image, str) and Path(image).is_absolute() else ""
