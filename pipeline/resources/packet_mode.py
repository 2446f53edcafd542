"""What a pseudo-terminal in packet mode (TIOCPKT) has to report to its master, told again.

The kernel holds one byte of bits with the pair, which the master reads before anything else: buffers were flushed,
output was stopped or started, ^S and ^Q got or lost their usual meaning, settings changed under EXTPROC. Nothing sets
them but the acts themselves. Switching packet mode on forgets them.

Source: ioctl_tty(2); drivers/tty/pty.c `pty_set_termios`, drivers/tty/n_tty.c `n_tty_packet_mode_flush`.
"""

from __future__ import annotations

import termios

from msgspec.structs import replace

from pipeline.ids import LocalFd
from pipeline.resources import terminal

#: TIOCPKT_*, what packet mode reports (ioctl_tty(2))
_FLUSHREAD, _FLUSHWRITE, STOP, _START, _NOSTOP, _DOSTOP, _IOCTL = (1 << bit for bit in range(7))
#: those that come about only where no input waits
BEFORE_INPUT = _FLUSHREAD | _IOCTL
_IXON = 0o2000
_EXTPROC = 0o200000
_VSTART = 8
_VSTOP = 9


def tell(slave: LocalFd, events: int) -> None:
    """Let packet mode report `events`, by doing what they are about to a terminal in which nothing waits."""
    if events & _FLUSHREAD:
        termios.tcflush(slave, termios.TCIFLUSH)
    if events & _FLUSHWRITE:
        termios.tcflush(slave, termios.TCOFLUSH)
    if events & _START:  # STOP comes when it is stopped
        termios.tcflow(slave, termios.TCOOFF)
        termios.tcflow(slave, termios.TCOON)
    usual = terminal.settings(slave)
    others = []
    if events & _IOCTL:
        others.append(replace(usual, lflag=usual.lflag ^ _EXTPROC))
    if events & _DOSTOP:  # ^S and ^Q have their usual meaning now
        others.append(replace(usual, characters=_with(usual.characters, 1, 2)))
    if events & _NOSTOP:
        others.append(replace(usual, iflag=_IXON, characters=_with(usual.characters, 0x13, 0x11)))
    for other in others:
        terminal.set_settings(slave, other)
        terminal.set_settings(slave, usual)


def _with(characters: bytes, stop: int, start: int) -> bytes:
    changed = bytearray(characters)
    changed[_VSTOP], changed[_VSTART] = stop, start
    return bytes(changed)
