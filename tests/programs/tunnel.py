"""A network of its own, and a process that answers the packets of a tun device whose descriptor it is given.

Who gives it connects to the socket `give` in the directory. IPv4 packets are sent back with their addresses and ports
exchanged. Needs CAP_SYS_ADMIN in its user namespace.
"""

import os
import socket
import time

from support import DIRECTORY, libc, main

CLONE_NEWNET = 0x40000000


def body(program):
    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")
    given = socket.socket(socket.AF_UNIX)
    given.bind(os.path.join(DIRECTORY, "give"))
    os.chmod(os.path.join(DIRECTORY, "give"), 0o777)
    given.listen()
    tunnel = []

    def answer():
        if not tunnel:
            sender, _ = given.accept()
            _, fds, _, _ = socket.recv_fds(sender, 1, 1)
            sender.close()
            tunnel.extend(fds)
        try:
            packet = os.read(tunnel[0], 2000)
        except OSError:  # it is attached to nothing
            time.sleep(0.01)
            return
        at = (packet[0] & 15) * 4
        if packet[0] >> 4 == 4:
            there, back = packet[12:16] + packet[at : at + 2], packet[16:20] + packet[at + 2 : at + 4]
            head = packet[:12] + back[:4] + there[:4] + packet[20:at]
            os.write(tunnel[0], head + back[4:] + there[4:] + packet[at + 4 :])

    program.busy("packets are answered", answer)
    given.close()


main(body)
