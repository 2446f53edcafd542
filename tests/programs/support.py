"""How every test program is asked and how it answers.

A program is started as ``PROGRAM DIRECTORY``. Each of its processes that can answer
has a *role*. Once its state stands it makes ``ready.ROLE`` in the directory and polls
for ``request.1``, ``request.2``, ...; it answers with ``answer.N.ROLE``: one line (ROLE/CHECK,
a tab, what differs) for each difference, so an empty answer means that all is well. Requests are ``check``,
``spoil`` (every check breaks its own state: the next ``check`` must name all of them),
and ``end``. Files are reached through one directory descriptor, so that roots, working
directories and ids may be changed at will, and nothing but the state under test is open.

Standard library only, Python 3.11, no site-packages: a small program is carried fast.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback

DIRECTORY = os.path.abspath(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
_POLL_S = 0.004
_PATIENCE_S = 30.0 * float(os.environ.get("PIPELINE_TEST_SLOW", "1"))


def syscall(number, *args):
    """A system call; OSError with errno on failure."""
    result = libc.syscall(
        ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    )
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def call(function, *args):
    """A function of libc; OSError with errno on failure."""
    if function(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}{args}: {os.strerror(code)}")


def mount(source, target, kind, flags, data=None):
    """mount(2); texts as str or None."""
    texts = [text.encode() if text is not None else None for text in (source, target, kind, data)]
    call(libc.mount, *texts[:3], flags, texts[3])


def prctl(option, a=0, b=0, c=0, d=0):
    return syscall(157, option, a, b, c, d)


def status(field, pid="self"):
    """A field of /proc/PID/status, as text."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith(field + ":"):
                return line.split(":", 1)[1].strip()
    return None


def wait_for(condition, what, timeout_s=_PATIENCE_S):
    """Poll until `condition()` is true; its value. RuntimeError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout_s} s in vain for {what}")
        time.sleep(0.002)
    return value


class Program:
    """One process of a test program: its checks, and the loop that answers."""

    def __init__(self, role="main", directory=None):
        self.role = role
        self.directory = directory
        if directory is None:
            self.directory = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.checks = {}
        #: children that answer requests themselves and end when asked, and children that are killed at the end
        self.answering = []
        self.children = []

    def check(self, name, run, spoil):
        """`run()` returns None if the state is right, else what differs; `spoil()` breaks it."""
        assert name not in self.checks, name
        self.checks[name] = (run, spoil)

    def same(self, name, get, spoil):
        """The value of `get()` must stay what it is now."""
        before = get()

        def run():
            now = get()
            return None if now == before else f"was {before!r}, is {now!r}"

        self.check(name, run, spoil)

    def child(self, role, body):
        """Fork a process that runs `body(program)` and answers under `role`; returns its pid."""
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                program = Program(role, self.directory)
                body(program)
                program.serve()
                code = 0
            except BaseException:  # noqa: BLE001 (a forked child must not return into its parent's frames)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        self.answering.append(pid)
        self.wait_file(f"ready.{role}")
        return pid

    def busy(self, name, act):
        """Fork a process that does `act()` over and over; the check is that it still does."""
        pid = os.fork()
        if pid == 0:
            try:
                while True:
                    act()
            except BaseException:  # noqa: BLE001 (as in `child`)
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        self.children.append(pid)

        def runs():
            return None if os.waitpid(pid, os.WNOHANG) == (0, 0) else "it has ended"

        def end():
            os.kill(pid, signal.SIGKILL)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

        self.check(name, runs, end)

    def wait_file(self, name):
        wait_for(lambda: self.exists(name), name)

    def exists(self, name):
        try:
            os.stat(name, dir_fd=self.directory)
        except FileNotFoundError:
            return False
        return True

    def put(self, name, text):
        """Make a file in the directory in one step."""
        temporary = f".{name}.{self.role}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o644, dir_fd=self.directory)
        os.write(fd, text.encode())
        os.close(fd)
        os.rename(temporary, name, src_dir_fd=self.directory, dst_dir_fd=self.directory)

    def take(self, name):
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.directory)
        try:
            return os.read(fd, 1 << 16).decode()
        finally:
            os.close(fd)

    def run_checks(self):
        lines = []
        for name, (run, _) in self.checks.items():
            try:
                difference = run()
            except Exception as error:  # noqa: BLE001 (whatever a check meets is a difference)
                difference = f"{type(error).__name__}: {error}"
            if difference is not None:
                lines.append(f"{self.role}/{name}\t{difference}".replace("\n", " "))
        return lines

    def run_spoil(self):
        lines = []
        for name, (_, spoil) in self.checks.items():
            try:
                spoil()
            except Exception as error:  # noqa: BLE001 (likewise)
                lines.append(f"{self.role}/{name}: spoiling failed: {error!r}")
        return lines

    def serve(self):
        """Answer requests until ``end``; then wait for the children, which end too, and return."""
        self.put(f"ready.{self.role}", "\n".join(f"{self.role}/{name}" for name in self.checks))
        number = 1
        while True:
            while not self.exists(f"request.{number}"):
                time.sleep(_POLL_S)
            request = self.take(f"request.{number}")
            if request == "end":
                break
            lines = self.run_checks() if request == "check" else self.run_spoil()
            self.put(f"answer.{number}.{self.role}", "\n".join(lines))
            number += 1
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for pid in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in reversed(self.children + self.answering):  # a pid namespace ends after all in it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def main(body):
    """Run `body(program)` as the first process, then answer."""
    program = Program()
    body(program)
    program.serve()
    os._exit(0)
