"""What is closed for the last time is told at once to whoever is at the other end, and never again to who watched it.

Somebody else who has a duplicate meanwhile keeps it open.
"""

import fcntl
import os
import select
import socket
import time

from support import main

HELD_S = 0.002


def forever(program):
    watching = select.epoll()
    here = os.readlink(f"/proc/self/fd/{program.directory}")

    def closes():
        ours, theirs = socket.socketpair()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{here}")
        listener.listen()
        into, out_of = os.pipe()
        locked = os.open(f"{here}/lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        watching.register(ours, select.EPOLLIN)
        time.sleep(HELD_S)
        listener.close()
        os.close(out_of)
        os.close(locked)
        ours.close()
        assert theirs.recv(1, socket.MSG_DONTWAIT) == b""
        theirs.close()
        assert watching.poll(0) == [], "an epoll instance tells of a socket that was closed"
        os.set_blocking(into, False)
        assert os.read(into, 1) == b""
        os.close(into)

    return closes


def body(program):
    program.busy("what is closed is closed", forever(program))


if __name__ == "__main__":
    main(body)
