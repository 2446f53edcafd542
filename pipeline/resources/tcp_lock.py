"""Connections with a peer outside of the tree are locked while it stands still: not a packet passes, either way.

A peer whose segments are lost sends them again; one whose segments are answered by nobody's socket is told RST, and
one whose segments are acknowledged by a socket that was read already loses them. So a table of packet filter rules
drops exactly these connections' packets before they are read, in the network that they belong to.

- While the tree is looked at, the table is owned by a netlink socket of ours (`pipeline.kernel.nfnetlink`): whatever
  becomes of us, SIGKILL too, the kernel takes the table away with the socket, and the connections go on.
- When the tree has ended, a network of its own is about to end, too. The kernel takes rules away before devices, and
  would answer in between: so the devices are set down first. Their addresses move with the tree anyway.
- In the network around the tree a second table that nobody owns takes the place of the first, until the one who
  restores the tree there takes it away (`unlock`), or it is known that the tree runs elsewhere. While an image waits,
  `python -m pipeline clean` leaves the table; when that image is gone, it deletes it.

Source: nft(8); pipeline/kernel/nfnetlink.py.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.kernel import nfnetlink, rtnetlink
from pipeline.kernel.nfnetlink import LOOKING, Ends, Listener
from pipeline.kernel.rtnetlink import RTM, Netlink
from pipeline.ledger import LEDGER
from pipeline.leftovers import notes_directory
from pipeline.resources.namespaces import links

_ENTRY = "lock of connections"
_KEPT = "pipeline-kept-"
_UP, _LOOPBACK = 0x1, 0x8
#: what an image may call a lock
NAME = re.compile(r"[0-9a-f]{16}")


class Lock:
    """The locked connections of one network; `keep` or `close` ends it.

    Args:
        name: of the lock, which `unlock` is told.
        made: makes a socket in the network.
        ends: of the connections.
        listeners: nobody new may come to.
        around: the network is not the tree's own.

    Raises:
        OSError: the kernel does not make the table; nothing is left.
    """

    def __init__(
        self,
        name: str,
        made: Callable[[Callable[[], socket.socket]], socket.socket],
        ends: Sequence[Ends],
        listeners: Sequence[Listener],
        around: bool,
    ) -> None:
        self._name = name
        self._ends = ends
        self._around = around
        self._sock = made(nfnetlink.open_socket)
        self._route: socket.socket | None = None
        LEDGER.take(_ENTRY, id(self))
        try:
            if not around:
                self._route = made(rtnetlink.socket_of)
            nfnetlink.make_lock(self._sock, LOOKING + name, ends, listeners, owned=True)
        except BaseException:
            self.close()
            raise

    def keep(self, image: str) -> None:
        """Keep the connections locked behind our own end: see the module.

        Args:
            image: where the image is that waits for them; empty where nobody can say.

        Raises:
            OSError: the kernel does not let us.
        """
        if self._route is not None:
            _silence(Netlink(self._route))
        elif self._ends:
            note = _note_of(self._name)
            if note is not None:
                with suppress(OSError):
                    note.write_text(json.dumps(image), encoding="utf-8")
            try:
                nfnetlink.make_lock(self._sock, _KEPT + self._name, self._ends, (), owned=False)
            except BaseException:
                _forget(note)
                raise

    def forget(self) -> None:
        """Take away what `keep` has made. OSError: the kernel does not."""
        if self._around:
            _delete(self._sock, self._name)

    def close(self) -> None:
        """The owned table ends with its socket. To be called once."""
        if self._route is not None:
            self._route.close()
        self._sock.close()
        LEDGER.give_back(_ENTRY, id(self))


def _silence(route: Netlink) -> None:
    """Set every device of a network down, but the loopback."""
    for content in list(route.dump(RTM.GETLINK, links.head_of(0))):
        index, flags = struct.unpack_from("<iI", content, 4)
        if flags & _UP and not flags & _LOOPBACK:
            _set_down(route, index)


def _set_down(route: Netlink, index: int) -> None:
    try:
        route.do(RTM.SETLINK, links.head_of(index, 0, _UP))
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise


def unlock(name: str) -> None:
    """Take away the lock `name` from the caller's network, if it was kept there. OSError: the kernel does not."""
    with nfnetlink.open_socket() as sock:
        _delete(sock, name)


def _delete(sock: socket.socket, name: str) -> None:
    nfnetlink.delete_table(sock, _KEPT + name)
    _forget(_note_of(name))


def _note_of(name: str) -> Path | None:
    """Where it is noted which image a kept lock waits for; None where there is no such place."""
    folder = notes_directory()
    return folder / f"{_KEPT}{name}.image" if folder is not None else None


def _forget(note: Path | None) -> None:
    if note is not None:
        with suppress(OSError):
            note.unlink(missing_ok=True)


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
    note = _note_of(name)
    if note is None:
        return ""
    try:
        image = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return image if isinstance(image, str) and Path(image).is_absolute() else ""
