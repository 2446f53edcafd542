"""A network of its own in which a process answers every numbered word on every TCP connection to port 9.

The devices are made by whoever is outside. Needs CAP_SYS_ADMIN in its user namespace.
"""

import selectors
import socket

from support import libc, main

CLONE_NEWNET = 0x40000000
WORD_BYTES = 8


def body(program):
    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")
    listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", 9))
    listener.listen(100)
    ready = selectors.DefaultSelector()
    ready.register(listener, selectors.EVENT_READ)
    heard = {}

    def answer():
        for key, _ in ready.select():
            if key.fileobj is listener:
                sock, _ = listener.accept()
                ready.register(sock, selectors.EVENT_READ)
                heard[sock] = b""
                continue
            text = key.fileobj.recv(1 << 16)
            if not text:
                ready.unregister(key.fileobj)
                key.fileobj.close()
                continue
            heard[key.fileobj] += text
            whole = len(heard[key.fileobj]) // WORD_BYTES * WORD_BYTES
            words, heard[key.fileobj] = heard[key.fileobj][:whole], heard[key.fileobj][whole:]
            for at in range(0, whole, WORD_BYTES):
                number = int(words[at : at + WORD_BYTES])
                key.fileobj.sendall(b"%08d" % (3 * number % 100_000_000))

    program.busy("words are answered", answer)
    listener.close()
    ready.close()


main(body)
