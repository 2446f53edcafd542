"""TLS over a connection, for large runs of bytes.

Trio's own SSLStream decrypts one record of 16 KiB a call, and each call is a turn of the
scheduler; a page run is 256 of them. Here a call takes whatever has arrived and decrypts
all of it, straight into the reader's buffer. What is large is encrypted and sent, or received and decrypted, in a
worker thread, so that several connections have several processors. The
cryptography and the protocol are the standard library's (`ssl.MemoryBIO`).

One task reads and one writes at a time. Not supported: changing back to plaintext.
"""

from __future__ import annotations

import ssl
import threading

import trio

from pipeline.transport.connection import Connection
from pipeline.transport.handover import LARGE_BYTES

#: encrypted or decrypted in one go: no other thread has its turn meanwhile
_PIECE_BYTES = 256 << 10
_CHUNK_BYTES = 1 << 20


class TlsStream(trio.abc.Stream):
    """An encrypted stream over `transport`; `do_handshake` comes first.

    Raises:
        ssl.SSLError: from every method: the peer cannot prove itself, or the stream is damaged.
        trio.BrokenResourceError: the connection broke.
    """

    def __init__(self, transport: Connection, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        #: held by whoever uses the three above, which know no threads
        self._using = threading.Lock()
        #: held from when something is taken out of `_outgoing` until it is sent
        self._send_lock = trio.Lock()

    async def do_handshake(self) -> None:
        """Prove ourselves and have the peer do so."""
        while True:
            try:
                self._ssl.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fetch()
            except ssl.SSLError:
                await self._flush()  # the alert that says why
                raise
            else:
                await self._flush()
                return

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send all of `data`."""
        view = memoryview(data)
        await trio.lowlevel.checkpoint_if_cancelled()
        while len(view) >= LARGE_BYTES:
            async with self._send_lock:
                done, rest = await trio.to_thread.run_sync(self._send_some, view)
                await self._transport.send_all(rest)
            view = view[done:]
        if view:
            with self._using:
                self._ssl.write(view)
            await self._flush()

    def _send_some(self, view: memoryview) -> tuple[int, memoryview]:
        """Encrypt and send until the network makes a pause: how much is encrypted, and what of that is not sent."""
        for start in range(0, len(view), _PIECE_BYTES):
            piece = view[start : start + _PIECE_BYTES]
            with self._using:
                self._ssl.write(piece)
                encrypted = memoryview(self._outgoing.read())
            sent = self._transport.send_some(encrypted)
            if sent < len(encrypted):
                return start + len(piece), encrypted[sent:]
        return len(view), view[:0]

    async def read_into(self, view: memoryview) -> int:
        """Decrypt what has arrived into `view`, at least one byte; 0 at the end of the stream.

        A large one is filled, if all of it comes without a pause.
        """
        if len(view) >= LARGE_BYTES:
            done = await trio.to_thread.run_sync(self._receive_some, view)
            await self._flush()
            if done is not None:
                return done
        while True:
            done = self._decrypt(view)
            if done is not None:
                await trio.lowlevel.checkpoint_if_cancelled()
                return done
            await self._flush()
            await self._fetch()

    def _receive_some(self, view: memoryview) -> int | None:
        """Receive and decrypt until `view` is full or the network makes a pause: None if nothing came; 0 at the end."""
        arrived = memoryview(bytearray(_PIECE_BYTES))
        done = 0
        while done < len(view):
            count = self._decrypt(view[done:])
            if count == 0:
                break
            if count is not None:
                done += count
                continue
            size = self._transport.receive_into(arrived)
            if size is None:
                return done or None
            self._arrived(arrived[:size])
        return done

    def _decrypt(self, view: memoryview) -> int | None:
        """Bytes decrypted, not too many at once; 0 at the end; None if more must arrive first."""
        done, most = 0, min(len(view), _PIECE_BYTES)
        with self._using:
            while done < most:
                try:
                    # the buffer form of SSLObject.read writes in place
                    count = self._ssl.read(most - done, view[done:most])
                except ssl.SSLWantReadError:
                    return done or None
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return done
                if not count:
                    return done
                done += int(count)
        return done

    def _arrived(self, data: bytes | bytearray | memoryview) -> None:
        with self._using:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Some decrypted bytes; empty at the end of the stream."""
        buffer = bytearray(max_bytes or _CHUNK_BYTES)
        count = await self.read_into(memoryview(buffer))
        return bytes(buffer[:count])

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream`."""
        await self._transport.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close the connection; the frames say where the conversation ends, not TLS."""
        await self._transport.aclose()

    async def _flush(self) -> None:
        with self._using:
            if not self._outgoing.pending:
                return
        async with self._send_lock:
            with self._using:
                data = self._outgoing.read()
            await self._transport.send_all(data)

    async def _fetch(self) -> None:
        self._arrived(await self._transport.receive_some(_CHUNK_BYTES))
