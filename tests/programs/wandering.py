"""A child that is in another directory every few ms; the one that it has been in is no more."""

import os
import signal
import time

from support import DIRECTORY, main

PAUSE_S = 0.003


def wander(base):
    number = 0
    while True:
        number += 1
        os.mkdir(f"{base}/{number}")
        os.chdir(f"{base}/{number}")
        os.rmdir(f"{base}/{number - 1}")
        time.sleep(PAUSE_S)


def body(program):
    base = f"{DIRECTORY}/way"
    os.makedirs(f"{base}/0")
    child = os.fork()
    if child == 0:
        wander(base)
    program.children.append(child)

    def goes_on():
        before = os.readlink(f"/proc/{child}/cwd")
        time.sleep(20 * PAUSE_S)
        now = os.readlink(f"/proc/{child}/cwd")
        return None if now != before else f"it stays in {now}"

    program.check("goes on", goes_on, lambda: os.kill(child, signal.SIGSTOP))


main(body)
