"""ADDRESS PORT COUNT: connections to Redis that ask nothing until SIGTERM, and then whether each still is one.

"idle" is made when all of them were served; what is wrong goes to "wrong".
"""

import signal
import socket
import sys

address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])


def answers(sock):
    sock.sendall(b"PING\r\n")
    return sock.recv(100) == b"+PONG\r\n"


signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
connections = [socket.create_connection((address, port)) for _ in range(count)]
assert all(map(answers, connections))
with open("idle", "w"):
    pass
signal.sigwait([signal.SIGTERM])
for number, one in enumerate(connections):
    try:
        if not answers(one):
            raise OSError("another answer")
    except OSError as error:
        with open("wrong", "a") as file:
            print(f"idle connection {number}: {error!r}", file=file)
