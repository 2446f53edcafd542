"""Large runs of bytes through worker threads: over sockets whose other side takes its time, ends, or says nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from pipeline.transport import connection, identity
from pipeline.transport.connection import Connection
from pipeline.transport.handover import LARGE_BYTES
from pipeline.transport.tls import TlsStream

SECRET = b"x" * 40
#: far more than a socket takes at once
CONTENT = os.urandom(3 << 20)
#: longer than a thread waits for the network
PAUSE_S = 0.03


@asynccontextmanager
async def connected(*, tls: bool) -> AsyncIterator[tuple[Connection | TlsStream, Connection | TlsStream]]:
    """Both sides of a connection with small buffers."""
    pair = socket.socketpair()
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 << 10)
    near, far = (Connection(trio.SocketStream(trio.socket.from_stdlib_socket(end))) for end in pair)
    try:
        if not tls:
            yield near, far
            return
        client = TlsStream(near, identity.client_context(SECRET), server_side=False)
        server = TlsStream(far, identity.server_context(SECRET), server_side=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.do_handshake)
            nursery.start_soon(server.do_handshake)
        yield client, server
    finally:
        await trio.aclose_forcefully(near)
        await trio.aclose_forcefully(far)


both = pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])


async def received(stream: Connection | TlsStream, size: int, pause: Callable[[], float]) -> bytes:
    """So many bytes, or what comes before the end; `pause` says how long to wait before each step."""
    content = bytearray(size)
    done = 0
    while done < size:
        await trio.sleep(pause())
        count = await stream.read_into(memoryview(content)[done:])
        if not count:
            break
        done += count
    return bytes(content[:done])


@both
async def test_what_is_large_arrives_both_ways_at_once(tls: bool):
    found: dict[str, bytes] = {}

    async def receive(name: str, stream: Connection | TlsStream) -> None:
        found[name] = await received(stream, len(CONTENT), lambda: 0.0)

    async with connected(tls=tls) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(receive, "near", near)
        nursery.start_soon(receive, "far", far)
        nursery.start_soon(near.send_all, CONTENT)
        nursery.start_soon(far.send_all, CONTENT[::-1])
    assert found == {"near": CONTENT[::-1], "far": CONTENT}


@both
async def test_what_is_large_and_small_arrives_in_order_over_a_network_with_pauses(tls: bool):
    sizes = [LARGE_BYTES - 1, LARGE_BYTES, 1, LARGE_BYTES + 1, 4096, 2 * LARGE_BYTES + 5, 7]
    pieces = [CONTENT[size : 2 * size] for size in sizes]
    steps = iter(range(1000))

    async def send(stream: Connection | TlsStream) -> None:
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(PAUSE_S)

    async with connected(tls=tls) as (near, far), trio.open_nursery() as nursery:
        nursery.start_soon(send, near)
        # every third step both a sender's thread and a receiver's have waited for too long
        content = await received(far, sum(sizes), lambda: 0.0 if next(steps) % 3 else PAUSE_S)
    assert content == b"".join(pieces)


def connection_of(stream: Connection | TlsStream) -> Connection:
    return stream._transport if isinstance(stream, TlsStream) else stream


async def until(holds: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not holds():
            await trio.sleep(0.001)


def threads() -> int:
    """How many of Trio's are at work."""
    return trio.to_thread.current_default_thread_limiter().borrowed_tokens  # type: ignore[return-value]


@both
@pytest.mark.parametrize("sends", [False, True], ids=["receives", "sends"])
async def test_who_waits_for_a_silent_peer_is_cancelled_and_holds_no_thread(tls: bool, sends: bool):
    async with connected(tls=tls) as (near, far):
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                if sends:
                    nursery.start_soon(near.send_all, CONTENT)
                    await trio.lowlevel.wait_readable(connection_of(far)._stream.socket)
                else:
                    nursery.start_soon(received, near, len(CONTENT), lambda: 0.0)
                    await far.send_all(CONTENT[: LARGE_BYTES // 2])
                await trio.testing.wait_all_tasks_blocked()
                await until(lambda: threads() == 0)
                nursery.cancel_scope.cancel()


@both
async def test_who_is_cancelled_while_bytes_trickle_does_not_send_all_of_them_first(
    tls: bool, monkeypatch: pytest.MonkeyPatch
):
    """There is never a pause in which the thread comes back."""
    monkeypatch.setattr(connection, "_PATIENCE_MS", 5000)
    size, got = 64 << 20, 0
    async with connected(tls=tls) as (near, far), trio.open_nursery() as nursery:

        async def trickle() -> None:
            nonlocal got
            piece = bytearray(16 << 10)
            while True:
                got += await far.read_into(memoryview(piece))
                await trio.sleep(0.001)

        nursery.start_soon(trickle)
        with trio.move_on_after(5 * PAUSE_S) as scope:
            await near.send_all(bytes(size))
        assert scope.cancelled_caught
        assert got < size // 2
        nursery.cancel_scope.cancel()


@both
async def test_a_peer_that_ends_in_the_middle_is_an_end_for_who_receives(tls: bool):
    async with connected(tls=tls) as (near, far), trio.open_nursery() as nursery:

        async def leave() -> None:
            await near.send_all(CONTENT[: LARGE_BYTES + 100])
            await trio.sleep(PAUSE_S)
            connection_of(near)._stream.socket.shutdown(socket.SHUT_WR)

        nursery.start_soon(leave)
        assert await received(far, len(CONTENT), lambda: 0.0) == CONTENT[: LARGE_BYTES + 100]


@both
async def test_a_peer_that_ends_in_the_middle_is_told_to_who_sends(tls: bool):
    async with connected(tls=tls) as (near, far), trio.open_nursery() as nursery:

        async def leave() -> None:
            await received(far, LARGE_BYTES, lambda: 0.0)
            await trio.sleep(PAUSE_S)
            await far.aclose()

        nursery.start_soon(leave)
        with pytest.raises(trio.BrokenResourceError):
            await near.send_all(CONTENT)


@both
@pytest.mark.parametrize("in_thread", [False, True], ids=["in a pause", "in a thread"])
async def test_who_sends_while_it_is_closed_is_told_so(
    tls: bool, in_thread: bool, monkeypatch: pytest.MonkeyPatch
):
    """It is closed when no thread uses it any more: its number may be somebody else's then."""
    monkeypatch.setattr(connection, "_PATIENCE_MS", 1000 if in_thread else 1)
    async with connected(tls=tls) as (near, far), trio.open_nursery() as nursery:
        below = connection_of(near)

        async def close() -> None:
            await trio.lowlevel.wait_readable(connection_of(far)._stream.socket)
            await until(lambda: below._sends.locked() == in_thread == bool(threads()))
            await near.aclose()
            assert not below._sends.locked()

        nursery.start_soon(close)
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(CONTENT)


async def test_who_is_closed_sends_and_receives_nothing():
    async with connected(tls=False) as (near, _):
        await near.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await near.send_all(CONTENT)
        with pytest.raises(trio.ClosedResourceError):
            await near.read_into(memoryview(bytearray(LARGE_BYTES)))
