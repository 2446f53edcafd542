"""Open files of a tree, made again: sockets of a network are made together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.image.codec import Image
from pipeline.image.schema import Id, OpenFile
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.resources.datagram_state import DatagramState
from pipeline.resources.sockets import EXTERNAL_NETWORK, SocketState
from pipeline.resources.tcp_state import TcpState
from pipeline.resources.udp_socket import UdpState
from pipeline.stages.descriptors import Descriptors
from tests.harness.tree import engine, reap, said

V4, V6 = socket.AF_INET, socket.AF_INET6
ELSEWHERE = EXTERNAL_NETWORK + 5


class _Counting(Descriptors):
    """All networks are our own; it counts who goes where."""

    visited: list[int]

    def in_network(self, netns: int, make: Callable[[], Any]) -> Any:
        self.visited.append(netns)
        return make()


def _tcp(family: int, netns: int = EXTERNAL_NETWORK, **options: bytes) -> TcpState:
    return TcpState(socket=_common(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, netns, options))


def _udp(family: int, netns: int = EXTERNAL_NETWORK) -> UdpState:
    return UdpState(socket=_common(family, socket.SOCK_DGRAM, socket.IPPROTO_UDP, netns, {}))


def _common(family: int, kind: int, protocol: int, netns: int, options: dict[str, bytes]) -> SocketState:
    ours = Id(0, os.getuid()), Id(0, os.getgid())
    return SocketState(
        family=family, type=kind, protocol=protocol, uid=ours[0], gid=ours[1], options=options, netns=netns
    )


@contextmanager
def _descriptors(states: Sequence[DatagramState | TcpState]) -> Iterator[_Counting]:
    image = Image()
    for index, state in enumerate(states, 1):
        kind = "tcp" if isinstance(state, TcpState) else "udp"
        built = msgspec.to_builtins(state, builtin_types=(bytes,))
        image.files[index] = OpenFile(index=index, kind=kind, flags=os.O_RDWR, state=built)

    def number(one: Id) -> int:
        return one.id

    unused: Any = None
    made = _Counting(
        image, {}, unused, unused, unused, (), number, number, {}, RestorePolicy(), unused, unused
    )
    made.visited = []
    try:
        yield made
    finally:
        made.close()


def _open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_sockets_that_are_alike_are_made_in_one_visit() -> None:
    states = [_tcp(V4), _udp(V6), _tcp(V4), _tcp(V6), _tcp(V4, ELSEWHERE), _udp(V6), _tcp(V4), _udp(V4)]
    before, held = _open_files(), LEDGER.held()
    with _descriptors(states) as made:
        for _ in made.create():
            pass
        assert sorted(made.visited) == [EXTERNAL_NETWORK] * 4 + [ELSEWHERE]
        for index, state in enumerate(states, 1):
            with socket.socket(fileno=os.dup(made.file(index))) as sock:
                assert (sock.family, sock.type, sock.proto) == (
                    state.socket.family,
                    state.socket.type,
                    state.socket.protocol,
                )
        assert len({os.fstat(made.file(index)).st_ino for index in range(1, 1 + len(states))}) == len(states)
        assert len(_open_files() - before) == len(states)
    assert (_open_files(), LEDGER.held()) == (before, held)


def test_what_was_made_for_others_is_closed_when_one_fails() -> None:
    before, held = _open_files(), LEDGER.held()
    with _descriptors([_tcp(V4), _tcp(V4, SO_NONSENSE=b"1"), _tcp(V4)]) as made:
        with pytest.raises(RebuildError, match="SO_NONSENSE"):
            list(made.create())
        assert made.visited == [EXTERNAL_NETWORK]
    assert (_open_files(), LEDGER.held()) == (before, held)


def test_no_socket_is_left_where_they_cannot_all_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    before, held = _open_files(), LEDGER.held()
    calls = 0

    class Third(socket.socket):
        def __init__(self, *args: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise OSError(24, "Too many open files")
            super().__init__(*args)

    monkeypatch.setattr(socket, "socket", Third)
    with _descriptors([_tcp(V4)] * 4) as made, pytest.raises(RebuildError, match="Too many"):
        list(made.create())
    monkeypatch.undo()
    assert (_open_files(), LEDGER.held()) == (before, held)


@pytest.mark.root
@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_a_program_without_any_descriptor_is_carried(tmp_path: Path, mode: str) -> None:
    command = ["sh", "-c", "exec sleep 1000 <&- >&- 2>&-"]
    with subprocess.Popen(command, start_new_session=True) as program:
        try:
            deadline = time.monotonic() + 10
            while os.listdir(f"/proc/{program.pid}/fd") or b"sleep" not in read_name(program.pid):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            done = engine("dump", "--pid", program.pid, "--to", tmp_path / "image", "--mode", mode)
            assert done.returncode == 0, said(done)
        finally:
            program.kill()
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    try:
        assert read_name(program.pid) == b"sleep\n"
        assert os.listdir(f"/proc/{program.pid}/fd") == []
    finally:
        os.kill(program.pid, signal.SIGKILL)
        assert not reap([program.pid])


def read_name(pid: int) -> bytes:
    """What a process executes."""
    return Path(f"/proc/{pid}/comm").read_bytes()
