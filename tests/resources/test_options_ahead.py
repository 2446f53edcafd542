"""Options of many sockets are read by another process meanwhile, and are those that each would be asked for."""

from __future__ import annotations

import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import msgpack
import pytest

from pipeline import blocking
from pipeline.errors import Blocker, Refused
from pipeline.ids import LocalFd
from pipeline.ledger import LEDGER
from pipeline.resources import options_ahead, socket_options
from pipeline.resources.socket_identity import Identity, identify
from pipeline.stages.observe import FileObserver
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, reap, restore

_SOL = socket.SOL_SOCKET


@pytest.fixture
def many() -> Iterator[list[socket.socket]]:
    """Of several kinds, with options that others of their kind have, and have not."""
    with ExitStack() as stack:
        found = [
            stack.enter_context(socket.socket(family, kind))
            for family, kind in [
                (socket.AF_INET, socket.SOCK_STREAM),
                (socket.AF_INET6, socket.SOCK_STREAM),
                (socket.AF_INET, socket.SOCK_DGRAM),
                (socket.AF_UNIX, socket.SOCK_STREAM),
                (socket.AF_NETLINK, socket.SOCK_RAW),
            ]
            for _ in range(3)
        ]
        found += map(stack.enter_context, socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        for sock in found[1::3]:
            sock.setsockopt(_SOL, socket.SO_SNDTIMEO, struct.pack("qq", 7, 0))
        found[0].setsockopt(_SOL, socket.SO_PRIORITY, 3)  # the others are not like the first of their kind
        yield found


def _as_asked(socks: Sequence[socket.socket]) -> list[tuple[LocalFd, Identity]]:
    return [(LocalFd(sock.fileno()), identify(sock)) for sock in socks]


def test_what_is_alike_is_packed_once_and_is_what_it_was(many: list[socket.socket]) -> None:
    wanted = [socket_options.capture(sock, identify(sock)) for sock in many]
    assert all(wanted)
    packed = msgpack.packb(socket_options.capture_all(_as_asked(many)))
    assert socket_options.unpacked(msgpack.unpackb(packed, use_list=False)) == wanted
    assert len(packed) < len(msgpack.packb(wanted)) / 2


def test_what_one_does_not_have_that_is_like_another_is_left_out(
    many: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option that the kernel has for some states only."""
    genuine = socket_options.capture
    wanted: list[socket_options.Values] = []

    def capture(sock: socket.socket, who: Identity) -> socket_options.Values:
        values = genuine(sock, who)
        if len(wanted) % 2:
            del values["SO_PRIORITY"]
        wanted.append(values)
        return values

    monkeypatch.setattr(socket_options, "capture", capture)
    found = socket_options.unpacked(socket_options.capture_all(_as_asked(many)))
    assert found == wanted


def _killed(_: list[LocalFd], __: Sequence[Identity]) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _failing(_: list[LocalFd], __: Sequence[Identity]) -> NoReturn:
    raise ValueError


@pytest.mark.root
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
@pytest.mark.parametrize("child", [None, _killed, _failing], ids=["reads", "killed", "fails"])
def test_sockets_of_a_tree_are_asked_by_the_child_or_by_us(
    start: Callable[..., Tree],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: Setting,
    child: Callable[..., NoReturn] | None,
) -> None:
    tree = start("connections", setting)
    family = tree.pids()
    asked: list[int] = []
    genuine = socket_options.capture

    def capture(sock: socket.socket, who: Identity) -> socket_options.Values:
        asked.append(os.getpid())
        return genuine(sock, who)

    if child is not None:
        monkeypatch.setattr(options_ahead, "_read", child)
    monkeypatch.setattr(socket_options, "capture", capture)
    blocking.dump(tree.pid, str(tmp_path / "image"))
    assert not reap(family)
    assert bool(asked) == (child is not None)
    restore(tree, tmp_path / "image")
    tree.check()


@pytest.mark.root
@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_a_tree_that_is_refused_meanwhile_runs_on_when_the_child_holds_nothing_of_it(
    start: Callable[..., Tree], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: Setting
) -> None:
    tree = start("connections", setting)
    held: list[list[str]] = []
    genuine = FileObserver.blockers

    def blockers(files: FileObserver) -> Iterator[Blocker]:
        yield from genuine(files)
        if not files.still:
            return
        shield = files.shield
        settle = shield.settle

        def settled() -> None:
            if shield._is_busy:
                settle()
                there = f"/proc/{shield.child}/fd"
                held.append([os.readlink(f"{there}/{fd}") for fd in os.listdir(there)])

        monkeypatch.setattr(shield, "settle", settled)
        assert shield._is_busy, "the sockets are looked at meanwhile"
        yield Blocker("it", "is refused")

    monkeypatch.setattr(FileObserver, "blockers", blockers)
    with pytest.raises(Refused, match="it: is refused"):
        blocking.dump(tree.pid, str(tmp_path / "image"))
    for links in held:
        assert len([link for link in links if link.startswith("socket:")]) == 1, "its own connection to us"
    assert held
    assert not LEDGER.held()
    monkeypatch.undo()
    tree.check()
