"""Connections: the same conversations over TLS and plain TCP; strangers get nothing."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from pipeline.errors import PeerError, UsageError
from pipeline.image import frames
from pipeline.image.frames import PageRun
from pipeline.image.schema import UserNamespace
from pipeline.transport import identity, protocol, tcp
from pipeline.transport.buffers import LeasedRun
from pipeline.transport.protocol import Commit, Hello, Refuse
from pipeline.transport.tcp import Channel

SECRET = b"0123456789abcdef0123456789abcdef"
HELLO = Hello(1, "x86_64", "6.18")
PLAIN = pytest.mark.parametrize("plaintext", [False, True], ids=["tls", "plain"])


@dataclass
class Server:
    port: int
    failures: list[str] = field(default_factory=list)
    handled: int = 0


@asynccontextmanager
async def serving(
    handler: Callable[[Channel], Awaitable[None]], *, plaintext: bool = False, secret: bytes = SECRET
) -> AsyncIterator[Server]:
    server = Server(0)
    ready = trio.Event()

    def listening(host: str, port: int) -> None:
        server.port = port
        ready.set()

    async def handle(channel: Channel) -> None:
        server.handled += 1
        await handler(channel)

    async def listen() -> None:
        await tcp.listen(
            "127.0.0.1",
            0,
            secret,
            handle,
            plaintext=plaintext,
            listening=listening,
            failed=server.failures.append,
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        await ready.wait()
        yield server
        nursery.cancel_scope.cancel()


async def ask(channel: Channel) -> None:
    await channel.say(HELLO)
    await channel.hear()


async def greet(channel: Channel) -> None:
    await channel.hear()
    await channel.say(HELLO)


@PLAIN
async def test_messages_records_and_pages_arrive_in_order(plaintext: bool):
    got: list[object] = []
    done = trio.Event()

    async def collect(channel: Channel) -> None:
        await greet(channel)
        while (item := await channel.reader.next()) is not None:
            if isinstance(item, LeasedRun):
                got.append((item.run.segments, bytes(item.run.payload)))
                item.lease.release()
            else:
                got.append(item)
            if len(got) == 11:
                break
        done.set()

    payload = bytes(range(256)) * 16384  # the largest run
    async with serving(collect, plaintext=plaintext) as server:
        async with tcp.connect("127.0.0.1", server.port, SECRET, plaintext=plaintext) as channel:
            await channel.say(HELLO)
            assert await channel.hear() == HELLO
            await channel.writer.record(UserNamespace(index=0))
            await channel.writer.flush()
            for number in range(10):
                segments = [(number << 32, len(payload))]
                await channel.writer.pages(PageRun(1, segments, memoryview(payload)))
            with trio.fail_after(30):
                await done.wait()
    assert got[0] == UserNamespace(index=0)
    assert got[1:] == [([(number << 32, len(payload))], payload) for number in range(10)]
    assert server.failures == []


@PLAIN
async def test_another_secret_is_turned_away(plaintext: bool):
    async with serving(greet, plaintext=plaintext) as server:
        with pytest.raises(PeerError, match="secret"):
            async with tcp.connect(
                "127.0.0.1", server.port, b"another secret!!", plaintext=plaintext
            ) as channel:
                await ask(channel)
        with trio.fail_after(5):
            while not server.failures:
                await trio.sleep(0.01)
        assert server.handled == 0
        assert "secret" in server.failures[0]
        async with tcp.connect("127.0.0.1", server.port, SECRET, plaintext=plaintext) as channel:
            await channel.say(HELLO)
            assert await channel.hear() == HELLO  # the next one is served


@pytest.mark.parametrize("plaintext", [False, True], ids=["tls server", "plain server"])
async def test_one_side_with_tls_and_one_without_do_not_meet(
    plaintext: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tcp, "HANDSHAKE_S", 1.0)
    async with serving(greet, plaintext=plaintext) as server:
        with pytest.raises(PeerError, match="--plaintext"):
            async with tcp.connect("127.0.0.1", server.port, SECRET, plaintext=not plaintext) as channel:
                await ask(channel)
        with trio.fail_after(5):
            while not server.failures:
                await trio.sleep(0.01)
    assert "--plaintext" in server.failures[0]
    assert server.handled == 0


@PLAIN
async def test_a_stranger_that_sends_anything_gets_nothing(plaintext: bool):
    async with serving(greet, plaintext=plaintext) as server:
        stream = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with stream:
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
            with trio.fail_after(5):
                while not server.failures:
                    await trio.sleep(0.01)
    assert server.handled == 0


@PLAIN
async def test_a_stranger_that_says_nothing_is_dropped(plaintext: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tcp, "HANDSHAKE_S", 0.2)
    async with serving(greet, plaintext=plaintext) as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port):
            with trio.fail_after(5):
                while not server.failures:
                    await trio.sleep(0.01)
    assert "did not prove itself" in server.failures[0]
    assert server.handled == 0


async def test_a_client_certificate_is_no_server():
    """Whoever holds a certificate of the client's role cannot play the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    identity._arm(context, SECRET, "client")
    ours, theirs = trio.testing.memory_stream_pair()
    failed: list[Exception] = []

    async def shake(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError as error:
            failed.append(error)
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(shake, trio.SSLStream(ours, context, server_side=True))
        nursery.start_soon(shake, trio.SSLStream(theirs, identity.client_context(SECRET)))
    assert any("purpose" in str(error.__cause__).lower() for error in failed)


@PLAIN
async def test_a_peer_that_goes_away_is_a_peer_error(plaintext: bool):
    async def leave(channel: Channel) -> None:
        await channel.hear()

    async with serving(leave, plaintext=plaintext) as server:
        with pytest.raises(PeerError):
            async with tcp.connect("127.0.0.1", server.port, SECRET, plaintext=plaintext) as channel:
                await ask(channel)


async def test_what_may_not_be_said_is_refused_on_both_sides():
    async with serving(greet) as server:
        async with tcp.connect("127.0.0.1", server.port, SECRET) as channel:
            with pytest.raises(PeerError, match="this side says Commit"):
                await channel.say(Commit())


async def test_data_where_a_message_belongs_is_refused():
    async with serving(greet) as server:
        async with tcp.connect("127.0.0.1", server.port, SECRET) as channel:
            await channel.writer.record(UserNamespace(index=0))
            await channel.writer.flush()
            with trio.fail_after(5):
                while not server.failures:
                    await trio.sleep(0.01)
    assert "data where a message belongs" in server.failures[0]


async def test_a_refusal_is_heard_with_its_reason():
    near, far = trio.testing.memory_stream_pair()
    source, destination = Channel(near, "source", "there"), Channel(far, "destination", "here")
    for channel in (source, destination):
        channel.conversation.state = "offered"
    await destination.say(Refuse("no room"))
    with pytest.raises(PeerError, match="there refused: no room"):
        await source.hear()


@pytest.mark.parametrize("cut", [0, 1, 31, 33, -1])
async def test_a_commit_that_is_cut_is_a_lost_peer_and_no_damaged_image(cut: int):
    """Whoever holds a prepared tree must know that this may have been the commit."""
    near, far = trio.testing.memory_stream_pair()
    destination = Channel(far, "destination", "there")
    destination.conversation.state = "prepared"
    await near.send_all(frames.encode(frames.Kind.MESSAGE, protocol.encode(Commit()))[:cut])
    await near.aclose()
    with pytest.raises(PeerError, match="went away"):
        await destination.hear()


async def test_a_stranger_that_is_gone_at_once_ends_nothing():
    async with serving(greet) as server:
        for _ in range(5):
            with socket.socket() as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.connect(("127.0.0.1", server.port))
        async with tcp.connect("127.0.0.1", server.port, SECRET) as channel:
            await ask(channel)


async def test_nobody_listens():
    with trio.socket.socket() as taken:
        await taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(PeerError, match="is `serve` running there"):
            async with tcp.connect("127.0.0.1", port, SECRET):
                pass


async def test_an_address_that_is_taken():
    async with serving(greet) as server:
        with pytest.raises(UsageError, match="cannot listen"):
            await tcp.listen(
                "127.0.0.1", server.port, SECRET, greet, listening=lambda *_: None, failed=lambda _: None
            )


@pytest.mark.parametrize(
    ("text", "address"),
    [("a:1", ("a", 1)), ("[::1]:7000", ("::1", 7000)), ("127.0.0.1:0", ("127.0.0.1", 0))],
)
def test_addresses(text: str, address: tuple[str, int]):
    assert tcp.parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "a", ":1", "a:", "a:b", "a:65536", "a:-1", "::1:7000", "[]:1", "a:\N{SUPERSCRIPT TWO}"]
)
def test_what_is_no_address_is_refused(text: str):
    with pytest.raises(UsageError):
        tcp.parse_address(text)


def test_a_secret_file(tmp_path: Path):
    path = tmp_path / "secret"
    path.write_text(identity.generate_secret() + "\n")
    path.chmod(0o600)
    assert len(identity.load_secret(str(path))) == 43
    assert identity.generate_secret() != identity.generate_secret()


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        (b"0123456789abcdef", 0o644, "chmod 600"),
        (b"0123456789abcdef", 0o640, "chmod 600"),
        (b"short\n", 0o600, "16"),
    ],
)
def test_a_bad_secret_file_is_refused(tmp_path: Path, content: bytes, mode: int, said: str):
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(UsageError, match=said):
        identity.load_secret(str(path))


def test_a_missing_secret_file_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="No such file"):
        identity.load_secret(str(tmp_path / "none"))
