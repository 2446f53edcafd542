"""A screenshot by VNC, and typing: the least that a client of RFB 3.8 has to say, and a PNG of what it is shown.

Sources: RFC 6143 (The Remote Framebuffer Protocol), RFC 2083 (PNG).
"""

from __future__ import annotations

import socket
import struct
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

_RAW = 0
_RETURN = 0xFF0D
#: 32 bits a pixel, little endian, 8 bits each of red, green and blue
_PIXELS = struct.pack(">BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)


@dataclass(frozen=True)
class Picture:
    """Rows from the top, 3 bytes a pixel."""

    width: int
    height: int
    rgb: bytes

    def save(self, path: Path) -> None:
        """Write it as PNG."""
        stride = 3 * self.width
        rows = b"".join(b"\0" + self.rgb[at : at + stride] for at in range(0, len(self.rgb), stride))
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
        path.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + b"".join(
                struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
                for kind, data in chunks
            )
        )


class _Connection:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self._sock.recv(count - len(data))
            if not more:
                raise ConnectionError("the VNC server went away")
            data += more
        return data

    def numbers(self, form: str) -> tuple[int, ...]:
        return struct.unpack(">" + form, self.take(struct.calcsize(">" + form)))


def screenshot(port: int, host: str = "127.0.0.1", patience_s: float = 10.0) -> Picture:
    """What a VNC server without authentication shows now.

    Raises:
        OSError: it does not answer within `patience_s`, or wants a password.
    """
    with _connected(port, host, patience_s) as sock:
        return _screenshot(sock)


def type_into(
    port: int, x: int, y: int, text: str, host: str = "127.0.0.1", patience_s: float = 10.0
) -> None:
    """Put the pointer somewhere and type; a line feed is the Return key.

    Raises:
        OSError: see `screenshot`.
    """
    with _connected(port, host, patience_s) as sock:
        _greet(sock)
        sock.sendall(struct.pack(">BBHH", 5, 0, x, y))
        for letter in text:
            key = _RETURN if letter == "\n" else ord(letter)
            sock.sendall(b"".join(struct.pack(">BBxxI", 4, down, key) for down in (1, 0)))
        _screenshot_of(sock, 1, 1)  # when this is answered, all of it has been read


def _connected(port: int, host: str, patience_s: float) -> socket.socket:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=patience_s)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _screenshot(sock: socket.socket) -> Picture:
    return _screenshot_of(sock, *_greet(sock))


def _greet(sock: socket.socket) -> tuple[int, int]:
    """Come to terms; width and height of the screen."""
    server = _Connection(sock)
    server.take(12)
    sock.sendall(b"RFB 003.008\n")
    if 1 not in server.take(server.take(1)[0]):
        raise ConnectionError("the VNC server wants a password")
    sock.sendall(b"\1")
    server.numbers("I")
    sock.sendall(b"\1")  # others may stay
    width, height = server.numbers("HH")
    server.take(16)
    server.take(server.numbers("I")[0])
    sock.sendall(b"\0\0\0\0" + _PIXELS)
    sock.sendall(struct.pack(">BBHi", 2, 0, 1, _RAW))
    return width, height


def _screenshot_of(sock: socket.socket, width: int, height: int) -> Picture:
    server = _Connection(sock)
    sock.sendall(struct.pack(">BBHHHH", 3, 0, 0, 0, width, height))
    shown = bytearray(3 * width * height)
    missing = width * height
    while missing > 0:
        if server.take(1) != b"\0":
            raise ConnectionError("the VNC server says something that this client does not know")
        (count,) = server.numbers("xH")
        for _ in range(count):
            left, top, across, down, encoding = server.numbers("HHHHi")
            if encoding != _RAW:
                raise ConnectionError(f"encoding {encoding} was not asked for")
            for row in range(down):
                line = server.take(4 * across)
                at = 3 * ((top + row) * width + left)
                for colour in range(3):
                    shown[at + colour : at + 3 * across : 3] = line[2 - colour :: 4]
            missing -= across * down
    return Picture(width, height, bytes(shown))


def main() -> None:
    """``python examples/vnc/rfb.py PORT FILE.png``, or ``... PORT X Y TEXT`` to type."""
    if len(sys.argv) == 3:
        screenshot(int(sys.argv[1])).save(Path(sys.argv[2]))
    elif len(sys.argv) == 5:
        port, x, y = map(int, sys.argv[1:4])
        type_into(port, x, y, sys.argv[4])
    else:
        sys.exit("usage: python examples/vnc/rfb.py PORT FILE.png, or PORT X Y TEXT")


if __name__ == "__main__":
    main()
