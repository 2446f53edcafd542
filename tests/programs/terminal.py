"""A pty pair with a session on it: controlling terminal, foreground group, settings, window size, bytes under way."""

import fcntl
import os
import select
import signal
import struct
import termios
import time

from support import main, wait_for

TIOCGPTN, TIOCSPTLCK, TIOCGPTLCK, TIOCGSID = 0x80045430, 0x40045431, 0x80045439, 0x5429


def window(fd):
    return struct.unpack("<4H", fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8)))


def set_window(fd, *size):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("<4H", *size))


def settings(fd):
    return termios.tcgetattr(fd)


def drain(fd):
    found = b""
    while True:
        try:
            piece = os.read(fd, 4096)
        except BlockingIOError:
            return found
        if not piece:
            return found
        found += piece


def body(program):
    master, slave = os.openpty()
    os.set_blocking(master, False)
    name = os.ttyname(slave)
    wanted = termios.tcgetattr(slave)
    wanted[3] &= ~(termios.ECHO | termios.ICANON)
    wanted[6][termios.VINTR] = b"\x05"
    wanted[6][termios.VMIN] = 0
    wanted[6][termios.VTIME] = 0
    termios.tcsetattr(slave, termios.TCSANOW, wanted)
    set_window(master, 33, 101, 7, 9)

    def shell(child):
        """A session leader on the terminal; a group in the foreground and one in the background."""
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        os.close(master)
        groups = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                while True:
                    time.sleep(0.5)
            wait_for(lambda pid=pid: os.getpgid(pid) == pid, "the group")
            groups.append(pid)
        child.children += groups
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.tcsetpgrp(slave, groups[0])
        told = []
        signal.signal(signal.SIGWINCH, lambda *_: told.append("another size"))
        child.same("nothing is told of the window", lambda: list(told), lambda: told.append("spoilt"))
        child.same("foreground group", lambda: os.tcgetpgrp(slave), lambda: os.tcsetpgrp(slave, groups[1]))

        def controlling():
            fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
            try:
                return struct.unpack("<i", fcntl.ioctl(fd, TIOCGSID, bytes(4)))[0], os.ttyname(slave)
            finally:
                os.close(fd)

        def tty_number():
            with open("/proc/self/stat") as file:
                return file.read().rsplit(")", 1)[1].split()[4]

        def leave():
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            fcntl.ioctl(slave, termios.TIOCNOTTY)

        child.same(
            "settings", lambda: settings(slave), lambda: termios.tcsetattr(slave, termios.TCSANOW, spoilt)
        )
        child.same("controlling terminal", lambda: (controlling(), tty_number()), leave)

    spoilt = termios.tcgetattr(slave)
    spoilt[6][termios.VINTR] = b"\x06"
    program.child("shell", shell)
    os.write(slave, b"output that nobody has read")
    program.check(
        "output", lambda: again(master, slave, b"output that nobody has read"), lambda: os.read(master, 3)
    )

    def again(reader, writer, expected):
        found = b""
        while select.select([reader], [], [], 0)[0]:  # lets the worker that passes bytes on finish first
            found += drain(reader)
        os.write(writer, found)
        return None if found == expected else f"{found!r}"

    os.write(master, b"typed ahead")
    program.check("input", lambda: again(slave, master, b"typed ahead"), lambda: os.write(master, b"!"))
    program.same(
        "name and number",
        lambda: (name, os.ttyname(slave), fcntl.ioctl(master, TIOCGPTN, bytes(4))),
        lambda: os.dup2(os.openpty()[1], slave),
    )
    program.same("window", lambda: window(slave), lambda: set_window(master, 1, 2, 3, 4))
    program.same(
        "lock",
        lambda: fcntl.ioctl(master, TIOCGPTLCK, bytes(4)),
        lambda: fcntl.ioctl(master, TIOCSPTLCK, struct.pack("<i", 1)),
    )
    stopped_master, stopped = os.openpty()
    os.write(stopped, b"before the stop")
    os.write(stopped_master, b"\x13")

    def stands():
        poll = select.poll()
        poll.register(stopped, select.POLLOUT)
        return poll.poll(0)

    def go_on():
        os.write(stopped_master, b"\x11")
        wait_for(stands, "the end of the stop")

    wait_for(lambda: not stands(), "the stop")
    program.same("stopped", stands, go_on)

    program.same(
        "flags",
        lambda: [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (master, slave)],
        lambda: os.set_blocking(slave, False),
    )


main(body)
