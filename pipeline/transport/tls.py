"""TLS over a Trio stream, for large runs of bytes.

Trio's own SSLStream decrypts one record of 16 KiB a call, and each call is a turn of the
scheduler; a page run is 256 of them. Here a call takes whatever has arrived and decrypts
all of it, straight into the reader's buffer, and encrypts a megabyte at once. The
cryptography and the protocol are the standard library's (`ssl.MemoryBIO`).

One task reads and one writes at a time. Not supported: changing back to plaintext.
"""

from __future__ import annotations

import ssl

import trio

_CHUNK_BYTES = 1 << 20


class TlsStream(trio.abc.Stream):
    """An encrypted stream over `transport`; `do_handshake` comes first.

    Raises:
        ssl.SSLError: from every method: the peer cannot prove itself, or the stream is damaged.
        trio.BrokenResourceError: the connection broke.
    """

    def __init__(self, transport: trio.abc.Stream, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._ssl = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
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
        for start in range(0, len(view), _CHUNK_BYTES):
            self._ssl.write(view[start : start + _CHUNK_BYTES])
            await self._flush()

    async def read_into(self, view: memoryview) -> int:
        """Decrypt what has arrived into `view`, at least one byte; 0 at the end of the stream."""
        while True:
            done = self._decrypt(view)
            if done is not None:
                await trio.lowlevel.checkpoint_if_cancelled()
                return done
            await self._flush()
            await self._fetch()

    def _decrypt(self, view: memoryview) -> int | None:
        """Bytes decrypted; 0 at the end; None if more must arrive first."""
        done = 0
        while done < len(view):
            try:
                # the buffer form of SSLObject.read writes in place
                count = self._ssl.read(len(view) - done, view[done:])
            except ssl.SSLWantReadError:
                return done or None
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return done
            if not count:
                return done
            done += int(count)
        return done

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
        async with self._send_lock:
            while self._outgoing.pending:
                await self._transport.send_all(self._outgoing.read())

    async def _fetch(self) -> None:
        data = await self._transport.receive_some(_CHUNK_BYTES)
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
