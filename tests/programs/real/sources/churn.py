"""Everything comes and goes, as fast as it can: threads, children, files of many kinds, mappings. Counts its rounds."""

import mmap
import os
import select
import socket
import subprocess
import tempfile
import threading
import time


def threads():
    while True:
        thread = threading.Thread(target=time.sleep, args=(0.001,))
        thread.start()
        thread.join()


def children():
    while True:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.001)


def programs():
    while True:
        subprocess.run(["true"], check=True)


def files():
    while True:
        for ends in (os.pipe(), (os.eventfd(1), os.memfd_create("short"), os.pidfd_open(os.getpid()))):
            for end in ends:
                os.close(end)
        one, other = socket.socketpair()
        one.send(b"x")
        for thing in (one, other, select.epoll(), socket.socket()):
            thing.close()
        with tempfile.TemporaryFile(), tempfile.NamedTemporaryFile():
            time.sleep(0.002)


def mappings():
    number = 0
    while True:
        number += 1
        with mmap.mmap(-1, (1 + number % 50) * mmap.PAGESIZE) as memory:
            memory[0] = 1
            time.sleep(0.001)
        with open("counts.new", "w") as out:
            out.write(f"{number}\n")
        os.rename("counts.new", "counts")


for work in (threads, threads, children, programs, files, files, mappings):
    threading.Thread(target=work).start()
