"""A process of its own that ends programs whose missing pages nobody can bring any more.

Run as a script, by `pipeline.remote.guard`: stdin is a SOCK_SEQPACKET socket. A message is one byte and the number of a
descriptor there, with a duplicate of it: ``m``: it watches memory, and is held; ``p``: a pidfd of whom to end. Without
one: ``c``: what is held by that number is closed; ``d``, alone: all pages are there, nothing is to be done.
If the socket ends without a ``d``, whoever held its other end is gone, and with it the way to the pages: everybody is
killed, with all descendants. Only then what is held is closed: nobody sees zeros where a page is missing.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
from contextlib import suppress

_KEY = struct.Struct("<ci")


def descendants(pids: set[int]) -> set[int]:
    """The living processes below `pids`, and those themselves."""
    found = set(pids)
    left = list(pids)
    while left:
        pid = left.pop()
        try:
            for tid in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{tid}/children", "rb") as children:
                    new = {int(word) for word in children.read().split()} - found
                found |= new
                left += new
        except OSError:
            continue
    return found


def pid_of(pidfd: int) -> int:
    """The process of a pidfd; 0 or less if it has ended or cannot be seen."""
    with open(f"/proc/self/fdinfo/{pidfd}", "rb") as info:
        return next(int(line.split()[1]) for line in info if line.startswith(b"Pid:"))


def tell(pidfd: int, number: int) -> None:
    """Send a signal, if there is still somebody to get it."""
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def end_all(pidfds: list[int]) -> None:
    """Kill them and their descendants: who is stopped has no more children."""
    known = {pid: pidfd for pidfd in pidfds if (pid := pid_of(pidfd)) > 0}
    given = set(known.values())
    for pidfd in given:
        tell(pidfd, signal.SIGSTOP)
    while new := descendants(set(known)) - set(known):
        for pid in new:
            try:
                known[pid] = os.pidfd_open(pid)
            except ProcessLookupError:
                known[pid] = -1
            else:
                tell(known[pid], signal.SIGSTOP)
    for pidfd in known.values():
        if pidfd >= 0:
            tell(pidfd, signal.SIGKILL)
            if pidfd not in given:
                os.close(pidfd)


def main() -> None:
    """See the module."""
    # who ends us by them, as `pkill` and systemd do with all of a name or a service, means who is watched over, too
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = socket.socket(fileno=0)
    victims: list[int] = []
    held: dict[int, list[int]] = {}
    while True:
        message, fds, _, _ = socket.recv_fds(channel, _KEY.size, 1)
        if message == b"d":
            return
        if not message:
            break
        what, number = _KEY.unpack(message)
        if what == b"p":
            victims += fds
        elif what == b"m":
            held[number] = fds
        else:
            for fd in held.pop(number, []):
                os.close(fd)
    end_all(victims)


if __name__ == "__main__":
    main()
