"""Connections between two hosts: TCP, TLS 1.3 on it, frames on that.

Nothing is read from a peer that has not proved itself but its half of the handshake,
and that within `HANDSHAKE_S`. With ``plaintext`` there is no TLS: both sides still prove
the secret to each other by answering a challenge, but everybody on the way can read
the memory of the tree. It is there to be measured against, and for links that are
encrypted below.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import trio

from pipeline.errors import ImageError, PeerError, PeerRefused, UsageError
from pipeline.image.frames import MAX_PAYLOAD_BYTES
from pipeline.transport import identity, protocol
from pipeline.transport.buffers import BufferPool
from pipeline.transport.connection import Connection
from pipeline.transport.framing import FrameReader, FrameWriter, Item, Message
from pipeline.transport.protocol import AnyMessage, Conversation, Refuse, Role
from pipeline.transport.tls import TlsStream

#: how long a peer may take to answer, and to prove itself: trees are moved away from hosts that have no time
_CONNECT_S = 10.0
HANDSHAKE_S = 30.0
#: a peer that is silently gone (its host, or the way to it), or takes nothing, is given up after this time
_SILENCE_S = 60
_KEEPALIVE_S = 10
#: what OpenSSL calls an answer that is none of TLS
_NO_TLS = "WRONG_VERSION_NUMBER"
_SAME = "has it the same secret, and --plaintext as we have or have not?"
_BUFFERS = 6
_NONCE_BYTES = 32
_PROOF_BYTES = 32


def notice_silence(connected: trio.socket.SocketType) -> None:
    """Let the kernel end a connection whose other side does not answer any more: a tree may stand still meanwhile.

    Source: tcp(7), TCP_USER_TIMEOUT.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _SILENCE_S)


def parse_address(text: str) -> tuple[str, int]:
    """``host:port`` or ``[v6]:port``.

    Raises:
        UsageError: it is neither.
    """
    host, separator, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"{text}: write an IPv6 address in brackets, like [::1]:7000")
    number = int(port) if port.isascii() and port.isdigit() and len(port) <= 5 else -1
    if not separator or not host or not 0 <= number <= 65535:
        raise UsageError(f"{text}: not HOST:PORT, like 192.0.2.7:7000")
    return host, number


class _Bytes:
    """A Trio stream as byte sink and source; errors of the network become `PeerError`."""

    def __init__(self, stream: trio.abc.Stream, peer: str) -> None:
        self._stream = stream
        self._peer = peer

    def _failed(self, error: Exception) -> PeerError:
        cause = error.__cause__ or error
        if isinstance(cause, ssl.SSLError) and cause.reason == _NO_TLS:
            return PeerError(
                f"{self._peer} does not speak TLS; give --plaintext to both sides, or to neither"
            )
        if isinstance(cause, ssl.SSLError):
            return PeerError(
                f"{self._peer}: the TLS handshake or stream failed ({cause.reason or cause}); "
                "has the other side the same secret?"
            )
        return PeerError(f"{self._peer}: the connection broke: {cause}")

    async def write(self, *buffers: bytes | memoryview) -> None:
        try:
            for buffer in buffers:
                await self._stream.send_all(buffer)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise self._failed(error) from error

    async def read_into(self, view: memoryview) -> int:
        try:
            if isinstance(self._stream, Connection | TlsStream):
                return await self._stream.read_into(view)
            data = await self._stream.receive_some(len(view))
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            raise self._failed(error) from error
        view[: len(data)] = data
        return len(data)


class Channel:
    """One side of a conversation: frames and messages over a stream.

    Args:
        stream: connected, and proved on both sides.
        role: which side this is.
        peer: how messages name the other side.
    """

    def __init__(self, stream: trio.abc.Stream, role: Role, peer: str) -> None:
        self.peer = peer
        self.conversation = Conversation(role)
        data = _Bytes(stream, peer)
        self.writer = FrameWriter(data)
        self.reader = FrameReader(data, BufferPool(_BUFFERS, MAX_PAYLOAD_BYTES), peer)

    async def say(self, message: protocol.Message) -> None:
        """Send a message."""
        self.conversation.said(message)
        await self.writer.message(protocol.encode(message))

    async def hear(self) -> AnyMessage:
        """The next message.

        Raises:
            PeerError: the other side went away (also in the middle of a frame), refused, or
                says what it may not.
        """
        try:
            item = await self.reader.next()
        except ImageError as error:
            raise PeerError(f"{self.peer} went away or sends what is no frame: {error}") from error
        return self.understand(item)

    def understand(self, item: Item | None) -> AnyMessage:
        """An item of the reader that must be a message; raises as `hear`."""
        if item is None:
            raise PeerError(f"{self.peer} went away")
        if not isinstance(item, Message):
            raise PeerError(f"{self.peer} sends data where a message belongs")
        message = protocol.decode(item.content)
        self.conversation.heard(message)
        if isinstance(message, Refuse):
            raise PeerRefused(f"{self.peer} refused: {message.reason}")
        return message


async def _prove(stream: trio.abc.Stream, secret: bytes, mine: identity.Role, peer: str) -> None:
    """Challenge and answer on a connection without TLS."""
    theirs: identity.Role = "client" if mine == "server" else "server"
    data = _Bytes(stream, peer)
    nonce = os.urandom(_NONCE_BYTES)
    await data.write(nonce)
    other = await _exactly(data, _NONCE_BYTES, peer)
    both = nonce + other if mine == "server" else other + nonce
    await data.write(identity.proof(secret, mine, both))
    answer = await _exactly(data, _PROOF_BYTES, peer)
    import hmac

    if not hmac.compare_digest(answer, identity.proof(secret, theirs, both)):
        raise PeerError(
            f"{peer} does not have the same secret, or speaks TLS: give --plaintext to both sides or none"
        )


async def _exactly(data: _Bytes, count: int, peer: str) -> bytes:
    raw = bytearray(count)
    done = 0
    while done < count:
        more = await data.read_into(memoryview(raw)[done:])
        if not more:
            raise PeerError(f"{peer} went away before it proved itself; {_SAME}")
        done += more
    return bytes(raw)


async def _secured(
    stream: Connection, secret: bytes, role: identity.Role, plaintext: bool, peer: str
) -> trio.abc.Stream:
    with trio.move_on_after(HANDSHAKE_S) as scope:
        if plaintext:
            await _prove(stream, secret, role, peer)
            return stream
        server = role == "server"
        context = identity.server_context(secret) if server else identity.client_context(secret)
        tls = TlsStream(stream, context, server_side=server)
        try:
            await tls.do_handshake()
        except (trio.BrokenResourceError, OSError) as error:
            raise _Bytes(stream, peer)._failed(error) from error
        return tls
    assert scope.cancelled_caught
    raise PeerError(f"{peer} did not prove itself within {HANDSHAKE_S:.0f} s")


_LISTEN_REMEDIES = {
    errno.EADDRINUSE: "another program listens there (ss -ltnp shows it): give another port; 0 picks a free one",
    errno.EACCES: "only root may have that port: give one from 1024 on; 0 picks a free one",
    errno.EADDRNOTAVAIL: "no address of this host: give one of them (ip address), or 0.0.0.0 for all",
}


def _why_not(error: BaseException) -> str:
    """Why a connection was not made, and what to do."""
    if isinstance(error, trio.TooSlowError):
        return "no answer; is `serve` running there, and does no firewall stand between?"
    if isinstance(error, socket.gaierror):
        return f"{error.strerror}; give a name that this host knows (getent hosts NAME), or the address"
    cause = error.__cause__  # of several addresses, each has failed in its way
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    return f"{reason}; is `serve` running there?"


@asynccontextmanager
async def connect(host: str, port: int, secret: bytes, *, plaintext: bool = False) -> AsyncIterator[Channel]:
    """A channel to a destination, which has proved itself as we have to it.

    Raises:
        PeerError: nobody listens, or it does not have the secret.
    """
    peer = f"{host}:{port}"
    try:
        with trio.fail_after(_CONNECT_S):
            socket_stream = await trio.open_tcp_stream(host, port)
    except (OSError, trio.TooSlowError) as error:
        raise PeerError(f"cannot connect to {peer}: {_why_not(error)}") from error
    connection = Connection(socket_stream)
    try:
        notice_silence(socket_stream.socket)
        stream = await _secured(connection, secret, "client", plaintext, peer)
        yield Channel(stream, "source", peer)
    finally:
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(connection)


async def listen(
    host: str,
    port: int,
    secret: bytes,
    handler: Callable[[Channel], Awaitable[None]],
    *,
    plaintext: bool = False,
    listening: Callable[[str, int], None],
    failed: Callable[[str], None],
) -> None:
    """Serve connections until cancelled; each is handled in a task of its own once it has proved itself.

    Args:
        listening: told the address, with the port that the kernel picked.
        failed: told in a line what went wrong with a peer; the others go on.

    Raises:
        UsageError: the address cannot be listened on.
    """

    async def handle(stream: trio.SocketStream) -> None:
        peer = "a peer"
        connection = Connection(stream)
        try:
            with suppress(OSError):  # it may be gone again already
                peer = "{}:{}".format(*stream.socket.getpeername()[:2])
            with suppress(OSError):
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                notice_silence(stream.socket)
            secured = await _secured(connection, secret, "server", plaintext, peer)
            await handler(Channel(secured, "destination", peer))
        except PeerError as error:
            failed(str(error))
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(connection)

    try:
        listeners = await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        what = _LISTEN_REMEDIES.get(error.errno or 0)
        if isinstance(error, socket.gaierror):
            what = "give an address of this host, such as 127.0.0.1, or 0.0.0.0 for all of them"
        remedy = f"; {what}" if what else ""
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror or error}{remedy}") from error
    address = listeners[0].socket.getsockname()
    listening(address[0], address[1])
    await trio.serve_listeners(handle, listeners)
