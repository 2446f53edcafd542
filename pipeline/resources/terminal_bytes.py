"""Bytes under way in a pseudo-terminal: taken, noted, and put back at once.

A terminal cannot be peeked at, and of a line that is typed but not finished the kernel
does not even tell that it is there. So the bytes are read and written again: output
through the slave with output processing off; input through the master with echo,
signals and every special character off, lines with the ends they had. The tree must be
frozen; settings, packet mode and lock are as before afterwards.

Input reaches the slave by a worker of the kernel, under the settings of that moment. In
canonical mode a stop and a start character behind it tell that it has arrived: writing
to the slave is not possible meanwhile. So a terminal that is stopped is started first, and stopped
again at the end the way it was: by a character (^S), or by a call (tcflow(3)), which only a call ends.
Refused is one whose input buffer is full of lines, which would let more in, and one whose input is stopped.

All this runs in a child process of its own, which no signal reaches: a pipeline that is
killed meanwhile does not leave a terminal without its bytes or its settings.

Source: termios(3), ioctl_tty(2); drivers/tty/n_tty.c, drivers/tty/pty.c.
"""

from __future__ import annotations

import errno
import os
import select
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from pipeline.ids import LocalFd
from pipeline.image.schema import U8, Record
from pipeline.resources import packet_mode, terminal
from pipeline.resources.shielded import Shield
from pipeline.resources.terminal import Settings

#: more than the buffers of one direction hold
_MOST_BYTES = 1 << 20
_IXON = 0o2000
_ICANON = 0o2
_EXTPROC = 0o200000
_VEOF = 4
_LINE_BYTES = 4096
_VSTART = 8
_VSTOP = 9
#: half of the kernel's buffer (N_TTY_BUF_SIZE)
_MOST_INPUT_BYTES = 2048
#: of more than this, some waits where FIONREAD does not see it
_SEEN_INPUT_BYTES = 4000
#: what the smallest buffer of the kernel holds (TTYB_ALIGN_MASK)
_SMALL_BYTES = 256
_PATIENCE_S = 5.0
_PAUSE_S = 0.000_2

Bytes = Annotated[bytes, Meta(max_length=_MOST_BYTES)]


class UnderWay(Record, frozen=True, kw_only=True):
    """Bytes that wait in a pseudo-terminal.

    `events`: what packet mode has to report, TIOCPKT_* bits. `stopped`: output waits for a start character or for
    TCOON. `output`: for the master. `lines`: finished lines for the slave; one that does not end in a newline was ended
    by an end-of-file character. `rest`: what is typed behind them; without canonical mode all of the input.
    """

    events: U8 = 0
    stopped: Literal["", "key", "call"] = ""
    output: Bytes = b""
    lines: Annotated[list[Bytes], Meta(max_length=1 << 16)] = []
    rest: Bytes = b""


def capture(master: LocalFd, shield: Shield) -> UnderWay:
    """Take what waits on both sides of a pair, and put it back; the slave must have been opened once.

    Args:
        master: of the pair.
        shield: whose child does it.

    Raises:
        OSError: ENOBUFS: the input is stopped or full; nothing was taken.
    """
    return msgspec.msgpack.decode(shield.run(_capture_there, [master]), type=UnderWay)


def _capture_there(masters: Sequence[LocalFd]) -> bytes:
    return msgspec.msgpack.encode(_capture(masters[0]))


def put(master: LocalFd, found: UnderWay) -> None:
    """Let `found` wait in an empty pair whose settings are final. The slave is opened for it and closed."""
    slave = terminal.open_slave(master, os.O_RDWR | os.O_NONBLOCK)
    try:
        _put(master, slave, found)
    finally:
        os.close(slave)


def _capture(master: LocalFd) -> UnderWay:
    packets, locked = terminal.packet_mode(master), terminal.locked(master)
    if locked:
        terminal.set_locked(master, False)
    try:
        slave = terminal.open_slave(master, os.O_RDWR | os.O_NONBLOCK)
        try:
            pending = packets and bool(_events(master, select.POLLPRI) & select.POLLPRI)
            _refuse_early(master, slave, pending)
            events = os.read(master, 1)[0] if pending else 0
            if packets:
                terminal.set_packet_mode(master, False)
            output = _drain(master)
            stopped = _start(slave)
            found = msgspec.structs.replace(_take_input(slave), output=output, stopped=stopped, events=events)
            _put(master, slave, found)
            return found
        finally:
            os.close(slave)
    finally:
        if packets:  # it is on already where events were told: then this forgets none
            terminal.set_packet_mode(master, True)
        if locked:
            terminal.set_locked(master, True)


def _refuse_early(master: LocalFd, slave: LocalFd, pending: bool) -> None:
    """What could not be put back is not taken.

    Args:
        pending: packet mode has something to report.

    Raises:
        OSError: ENOBUFS.
    """
    usual = terminal.settings(slave)
    waiting = _settled(slave)
    if waiting > _MOST_INPUT_BYTES and usual.lflag & _ICANON:
        raise OSError(errno.ENOBUFS, "the terminal is full of lines")
    mute = usual.lflag & _EXTPROC or (usual.iflag & _IXON and not usual.characters[_VSTOP])
    if mute and not _writable(slave):
        raise OSError(errno.ENOBUFS, "no character could stop it again")
    if waiting <= _MOST_INPUT_BYTES and not _writable(master):
        raise OSError(errno.ENOBUFS, "the input of the terminal is stopped")
    if pending and max(waiting, terminal.unread(master)) > _MOST_INPUT_BYTES:
        raise OSError(errno.ENOBUFS, "much waits behind an event of packet mode")


def _put(master: LocalFd, slave: LocalFd, found: UnderWay) -> None:
    """Let `found` wait in a pair that is empty and not in packet mode; with events it is in packet mode then.

    Some events come about only where no input waits: then they come first, and it is reported once more that output
    runs, and what ^S and ^Q mean.
    """
    first = bool(found.events & packet_mode.BEFORE_INPUT and (found.lines or found.rest))
    if first:
        terminal.set_packet_mode(master, True)
        packet_mode.tell(slave, found.events)
    _put_output(master, slave, found.output)
    _put_input(master, slave, found)
    if not found.events & packet_mode.STOP:
        _stop(master, slave, found.stopped)
    if found.events and not first:
        _wait_until(lambda: terminal.unread(master) == len(found.output))
        terminal.set_packet_mode(master, True)
        packet_mode.tell(slave, found.events)
    if found.events & packet_mode.STOP:
        _stop(master, slave, found.stopped)


def _events(fd: LocalFd, wanted: int) -> int:
    poll = select.poll()
    poll.register(fd, wanted)
    return sum(found for _, found in poll.poll(0))


def _writable(fd: LocalFd) -> bool:
    return bool(_events(fd, select.POLLOUT) & select.POLLOUT)


def _start(slave: LocalFd) -> Literal["", "key", "call"]:
    """Start a terminal whose output is read up; how it was stopped."""
    if _writable(slave):
        return ""
    termios.tcflow(slave, termios.TCOON)
    if _writable(slave):
        return "call"
    # what a character has stopped starts only when a call that stopped it, too, is taken back
    termios.tcflow(slave, termios.TCOOFF)
    termios.tcflow(slave, termios.TCOON)
    return "key"


def _stop(master: LocalFd, slave: LocalFd, how: str) -> None:
    if how == "call":
        termios.tcflow(slave, termios.TCOOFF)
    elif how == "key":
        # it has a meaning, or it could not have stopped anything
        os.write(master, terminal.settings(slave).characters[_VSTOP : _VSTOP + 1])
        _wait_until(lambda: not _writable(slave))


def _settled(slave: LocalFd) -> int:
    """Bytes of input, once the kernel's worker has nothing more to bring; poll(2) waits for it only at zero."""
    count = terminal.unread(slave)
    while count:
        time.sleep(_PAUSE_S)
        before, count = count, terminal.unread(slave)
        if before == count:
            break
    return count


def _drain(fd: LocalFd) -> bytes:
    found = bytearray()
    while count := terminal.unread(fd):
        found += os.read(fd, count)
    return bytes(found)


def _take_input(slave: LocalFd) -> UnderWay:
    usual = terminal.settings(slave)
    if not usual.lflag & _ICANON:
        return UnderWay(rest=_drain(slave))
    lines = []
    while _events(slave, select.POLLIN) & select.POLLIN:
        lines.append(os.read(slave, _LINE_BYTES))
    # Without canonical mode, what is typed of a line shows; characters keep their meaning for output.
    terminal.set_settings(slave, replace(usual, lflag=usual.lflag & ~_ICANON))
    try:
        rest = _drain(slave)
    finally:
        terminal.set_settings(slave, usual)
    return UnderWay(lines=lines, rest=rest)


def _put_output(master: LocalFd, slave: LocalFd, output: bytes) -> None:
    if output:
        usual = terminal.settings(slave)
        terminal.set_settings(slave, replace(usual, oflag=0))
        try:
            _write(slave, output, master)
        finally:
            terminal.set_settings(slave, usual)


def _put_input(master: LocalFd, slave: LocalFd, found: UnderWay) -> None:
    """Type everything: no echo, no signal, no character has a meaning but those that end a line."""
    if not (found.lines or found.rest):
        return
    usual = terminal.settings(slave)
    plain = replace(
        usual, iflag=0, lflag=usual.lflag & (_ICANON | _EXTPROC), characters=bytes(len(usual.characters))
    )
    try:
        if usual.lflag & _ICANON:
            _type_lines(master, slave, plain, found)
        else:
            terminal.set_settings(slave, plain)
            _write(master, found.rest, slave)
            _wait_until(lambda: terminal.unread(slave) >= min(len(found.rest), _SEEN_INPUT_BYTES))
    finally:
        terminal.set_settings(slave, usual)


def _type_lines(master: LocalFd, slave: LocalFd, plain: Settings, found: UnderWay) -> None:
    used = b"\n".join([*found.lines, found.rest])
    # 4095 bytes of input that have all but two of 256 values are not typed by anybody.
    end, stop, start = [byte for byte in range(1, 256) if byte not in used and byte != 0x0A][:3]
    characters = bytearray(plain.characters)
    characters[_VEOF], characters[_VSTOP], characters[_VSTART] = end, stop, start
    terminal.set_settings(slave, replace(plain, iflag=_IXON, characters=bytes(characters)))
    lines = b"".join(line if line.endswith(b"\n") else line + bytes([end]) for line in found.lines)
    _write(master, lines + found.rest + bytes([stop]), slave)
    _wait_until(lambda: not _writable(slave))
    _write(master, bytes([start]), slave)
    _wait_until(lambda: _writable(slave))


def _wait_until(condition: Callable[[], bool]) -> None:
    """Wait for the kernel's worker, which needs microseconds.

    Raises:
        OSError: ETIMEDOUT: it did not come.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "typed bytes do not arrive at the terminal")
        time.sleep(_PAUSE_S)


def _write(fd: LocalFd, content: bytes, other: LocalFd) -> None:
    """Write all, while the kernel's worker passes bytes on to the `other` side, from which nothing comes yet."""
    if len(content) > _SEEN_INPUT_BYTES:
        _make_room(fd, other)
    left = memoryview(content)
    piece = len(content)

    def write_more() -> bool:
        nonlocal left, piece
        try:
            left = left[os.write(fd, left[:piece]) :]
        except BlockingIOError:
            piece = _SMALL_BYTES
        terminal.unread(other)
        return not left

    if content:
        with _never_blocking(fd):
            _wait_until(write_more)


def _make_room(fd: LocalFd, other: LocalFd) -> None:
    """Let the kernel have many small buffers, which it then uses again however much waits in others.

    How much fits depends on the sizes in which it was written: with them at hand all that did will do so again.
    """
    with _never_blocking(fd), suppress(BlockingIOError):
        while True:
            os.write(fd, bytes(_SMALL_BYTES))
    _drain(other)


@contextmanager
def _never_blocking(fd: LocalFd) -> Iterator[None]:
    blocking = os.get_blocking(fd)
    os.set_blocking(fd, False)
    try:
        yield
    finally:
        os.set_blocking(fd, blocking)
