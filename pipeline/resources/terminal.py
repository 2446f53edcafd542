"""The ioctls of pseudo-terminals that the pty kind needs, each one typed.

Source: ioctl_tty(2), termios(3), pts(4); drivers/tty/n_tty.c, drivers/tty/pty.c.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import termios
from typing import Self

import msgspec

from pipeline.ids import LocalFd

PTS_MAJOR = 136
_TCGETS2 = 0x802C542A
_TCSETS2 = 0x402C542B
_TIOCGPTN = 0x80045430
_TIOCSPTLCK = 0x40045431
_TIOCGDEV = 0x80045432
_TIOCGPKT = 0x80045438
_TIOCGPTLCK = 0x80045439
_TIOCGEXCL = 0x80045440
_TIOCGPTPEER = 0x5441
_TIOCGSID = 0x5429
_TIOCGLCKTRMIOS = 0x5456
#: struct termios: four modes, line discipline, control characters
_TERMIOS_BYTES = 36


def _get(fd: int, request: int) -> int:
    (value,) = struct.unpack("<i", fcntl.ioctl(fd, request, bytes(4)))
    return int(value)


def _set(fd: int, request: int, value: int) -> None:
    fcntl.ioctl(fd, request, struct.pack("<i", value))


class Settings(msgspec.Struct, frozen=True):
    """`struct termios2`: modes, line discipline, control characters, speeds."""

    iflag: int
    oflag: int
    cflag: int
    lflag: int
    line: int
    characters: bytes
    ispeed: int
    ospeed: int

    _LAYOUT = "<4IB19s2I"
    BYTES = struct.calcsize(_LAYOUT)

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """From the kernel's `BYTES` bytes."""
        return cls(*struct.unpack(cls._LAYOUT, raw))

    def pack(self) -> bytes:
        """To the kernel's bytes."""
        return struct.pack(
            self._LAYOUT,
            self.iflag,
            self.oflag,
            self.cflag,
            self.lflag,
            self.line,
            self.characters,
            self.ispeed,
            self.ospeed,
        )


def settings(fd: LocalFd) -> Settings:
    """TCGETS2; on a master: those of its slave."""
    return Settings.unpack(fcntl.ioctl(fd, _TCGETS2, bytes(Settings.BYTES)))


def set_settings(fd: LocalFd, wanted: Settings) -> None:
    """TCSETS2."""
    fcntl.ioctl(fd, _TCSETS2, wanted.pack())


def any_setting_is_held(fd: LocalFd) -> bool:
    """TIOCGLCKTRMIOS: whether any bit of the settings cannot be changed; on a master: of its slave."""
    return any(fcntl.ioctl(fd, _TIOCGLCKTRMIOS, bytes(_TERMIOS_BYTES)))


def device(fd: LocalFd) -> tuple[int, int] | None:
    """(major, minor) of the terminal behind `fd`, also through /dev/tty; None if it is hung up."""
    try:
        encoded = _get(fd, _TIOCGDEV)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
    return decode(encoded)


def decode(encoded: int) -> tuple[int, int]:
    """(major, minor) of a device number as the kernel packs it into 32 bits (also /proc/PID/stat)."""
    return encoded >> 8 & 0xFFF, encoded & 0xFF | encoded >> 12 & 0xFFF00


def number(master: LocalFd) -> int:
    """TIOCGPTN: N of /dev/pts/N."""
    return _get(master, _TIOCGPTN)


def open_slave(master: LocalFd, flags: int = os.O_RDWR) -> LocalFd:
    """TIOCGPTPEER: open the slave without its path; the caller owns it. EIO if it is locked.

    The kernel keeps all `flags` as they are given, so close-on-exec is set afterwards.
    """
    fd = LocalFd(fcntl.ioctl(master, _TIOCGPTPEER, flags | os.O_NOCTTY))
    os.set_inheritable(fd, False)
    return fd


def unread(fd: LocalFd) -> int:
    """Bytes that can be read; lets the kernel's worker finish first, which poll(2) waits for."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(0)
    return _get(fd, termios.FIONREAD)


def session(master: LocalFd) -> int:
    """TIOCGSID: the session (in the caller's pid namespace) that the terminal controls; 0 if none."""
    try:
        return _get(master, _TIOCGSID)
    except OSError as error:
        if error.errno != errno.ENOTTY:
            raise
        return 0


def foreground(master: LocalFd) -> int:
    """TIOCGPGRP: the foreground process group, in the caller's pid namespace; 0 if none."""
    return _get(master, termios.TIOCGPGRP)


def discipline(fd: LocalFd) -> int:
    """TIOCGETD: 0 is N_TTY."""
    return _get(fd, termios.TIOCGETD)


def window(fd: LocalFd) -> bytes:
    """TIOCGWINSZ: rows, columns, width, height, 16 bits each."""
    return fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))


def set_window(fd: LocalFd, size: bytes) -> None:
    """TIOCSWINSZ."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, size)


def packet_mode(master: LocalFd) -> bool:
    """TIOCGPKT."""
    return bool(_get(master, _TIOCGPKT))


def set_packet_mode(master: LocalFd, on: bool) -> None:
    """TIOCPKT; switching it on forgets what was to be reported."""
    _set(master, termios.TIOCPKT, on)


def locked(master: LocalFd) -> bool:
    """TIOCGPTLCK: the slave cannot be opened."""
    return bool(_get(master, _TIOCGPTLCK))


def set_locked(master: LocalFd, lock: bool) -> None:
    """TIOCSPTLCK."""
    _set(master, _TIOCSPTLCK, lock)


def exclusive(fd: LocalFd) -> bool:
    """TIOCGEXCL, of this end."""
    return bool(_get(fd, _TIOCGEXCL))


def set_exclusive(fd: LocalFd) -> None:
    """TIOCEXCL, of this end."""
    fcntl.ioctl(fd, termios.TIOCEXCL)
