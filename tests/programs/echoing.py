"""A network of its own in which a process sends back every datagram of port 7, by whatever device it comes.

The devices are made by whoever is outside. Needs CAP_SYS_ADMIN in its user namespace.
"""

import contextlib
import socket

from support import libc, main

CLONE_NEWNET = 0x40000000


def body(program):
    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")
    echo = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    echo.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    echo.bind(("::", 7))

    def answer():
        text, sender = echo.recvfrom(100)
        with contextlib.suppress(OSError):  # the way back is gone while devices come and go
            echo.sendto(text[::-1], sender)

    program.busy("datagrams are sent back", answer)
    echo.close()


main(body)
