"""ADDRESS COUNT [SERVER...]: clients of Redis that check every answer, until SIGTERM; each keeps its one connection.

The least number of rounds goes to "rounds", what is wrong to "wrong", answers that took long to "gaps", all good at
the end to "ended".
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

address, count = sys.argv[1], int(sys.argv[2])
server = None
slow_s = 0.02
if len(sys.argv) > 3:  # the server is in the tree, too
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    server = subprocess.Popen(sys.argv[3:])
end = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: end.set())
done = [0] * count
slow = []


def connect():
    for _ in range(3000):
        try:
            return socket.create_connection((address, 6379))
        except OSError:
            time.sleep(0.02)
    raise OSError("there is no server")


def ask(sock, *words):
    sock.sendall(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words))
    answer = b""
    while answer.count(b"\r\n") < (2 if answer[:1] == b"$" else 1):
        piece = sock.recv(65536)
        if not piece:
            raise OSError("the connection has ended")
        answer += piece
    return answer


def work(n):
    try:
        sock = connect()
        key, pad = b"key:%d" % n, b"x" * (n * 40)
        while not end.is_set():
            number = done[n] + 1
            text = b"%d%s" % (number, pad)
            wanted = [b"+OK\r\n", b"$%d\r\n%s\r\n" % (len(text), text), b":%d\r\n" % number]
            asked = [(b"SET", key, text), (b"GET", key), (b"INCR", b"count:%d" % n)]
            for words, answer in zip(asked, wanted, strict=True):
                begin = time.monotonic()
                if (found := ask(sock, *words)) != answer:
                    raise OSError(f"{found!r} to {words!r}")
                if (lasted := time.monotonic() - begin) > slow_s:
                    slow.append(f"gap {1e3 * lasted:.1f} at {time.time():.3f}")
            done[n] = number
            time.sleep(0.002)
        found = ask(sock, b"GET", b"count:%d" % n).split(b"\r\n")[1]
        if int(found) != done[n]:
            raise OSError(f"{found} of {done[n]} writes are there")
    except Exception as error:  # noqa: BLE001 (whatever a client meets is wrong)
        with open("wrong", "a") as file:
            print(f"client {n} after {done[n]} rounds: {error!r}", file=file)


threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
for thread in threads:
    thread.start()
while not end.wait(0.02):
    with open(".rounds", "w") as file:
        file.write(str(min(done)))
    os.replace(".rounds", "rounds")
    with open("gaps", "a") as file:
        while slow:
            print(slow.pop(), file=file)
for thread in threads:
    thread.join()
if server is not None:
    server.terminate()
    server.wait()
open("ended", "w").close()
