"""Somebody who types into vim and less, each on a terminal of its own, and looks at what they make of it.

Rounds go to "counts", what is wrong to "wrong". SIGTERM: both are left by their own commands.
"""

import os
import pty
import select
import signal
import sys
import time


def wrong(text):
    with open("wrong", "a") as out:
        out.write(text + "\n")


class Terminal:
    def __init__(self, *command):
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "vt100"
            os.execvp(command[0], command)
        self.seen = b""

    def type(self, keys):
        os.write(self.master, keys)

    def until(self, what, holds):
        """Read what it shows until a condition holds."""
        deadline = time.monotonic() + 60
        while not holds():
            if time.monotonic() > deadline:
                wrong(f"{what}: {self.seen[-2000:]!r}")
                sys.exit(1)
            if select.select([self.master], [], [], 0.02)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:
                    return  # EIO: the other side has ended

    def status(self):
        self.until("its end", lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))
        return os.waitpid(self.pid, 0)[1]


def lines(path):
    try:
        with open(path) as file:
            return file.read().split()
    except FileNotFoundError:
        return []


def main():
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    with open("book", "w") as book:
        book.writelines(f"line {n} of the book\n" for n in range(1, 5001))
    vim = Terminal("vim", "-N", "-u", "NONE", "-i", "NONE", "notes")
    less = Terminal("less", "-S", "book")
    less.until("less shows the book", lambda: b"line 1 of" in less.seen)
    vim.until("vim shows its file", lambda: b"notes" in vim.seen)
    vim.type(b":set noswapfile\r:1\rcc0\x1b:w\r")
    vim.until("vim has written", lambda: lines("notes") == ["0"])
    number = 0
    while not ended:
        number += 1
        vim.type(b"yyp\x01:w\r")  # the last line once more, with the number increased
        vim.until(f"vim writes {number}", lambda n=number: lines("notes") == [str(k) for k in range(n + 1)])
        less.seen = b""
        place = 1 + number * 37 % 4900
        less.type(b"%dg" % place)
        less.until(f"less shows {place}", lambda n=place: b"line %d of the book" % n in less.seen)
        with open("counts", "a") as out:
            out.write(f"{number}\n")
        time.sleep(0.01)
    vim.type(b"u:q!\r")
    less.type(b"q")
    for terminal in (vim, less):
        if terminal.status():
            wrong(f"it ended with {terminal.status()}")


main()
