"""Jobs of an interactive shell: dumped from one terminal, restored on another, with keys, ^C, ^Z, fg and bg."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.image.schema import ShellJob
from pipeline.ledger import LEDGER
from pipeline.resources.shell_job import JobTerminal
from tests.harness import users
from tests.harness.tree import ROOT, children_of, engine, family_of, find_python, reap, said

pytestmark = pytest.mark.root

_PROMPT = b"READY> "
#: shows every key; ^C is counted, ^Z stops; SIGWINCH makes it draw itself
_KEYS = """
import os, signal, sys, termios, tty
usual = termios.tcgetattr(0)
tty.setcbreak(0)
own = termios.tcgetattr(0)
own[6][termios.VQUIT] = b"\\x05"
termios.tcsetattr(0, termios.TCSANOW, own)
signal.signal(signal.SIGINT, lambda *_: os.write(1, b"[interrupted]"))
signal.signal(signal.SIGWINCH, lambda *_: os.write(1, b"[drawn]"))
os.write(1, b"[begun %d %d]" % (os.getpid(), os.getpgrp()))
while True:
    key = os.read(0, 1)
    if key in (b"q", b""):
        break
    os.write(1, b"<%s>" % key)
terminal = os.open("/dev/tty", os.O_RDWR)
same = os.tcgetpgrp(terminal) == os.getpgrp() and os.fstat(0).st_rdev == os.stat(os.ttyname(0)).st_rdev
os.write(1, b"[end %d]" % same)
"""


class Shell:
    """An interactive bash on a terminal of its own, of root or of a plain user."""

    def __init__(self, directory: Path, uid: int = 0) -> None:
        self.directory = directory
        self.python = users.python_for_all() if uid else sys.executable
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            if uid:
                os.fchown(0, uid, -1)
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
            os.chdir(directory)
            environment = {
                "PATH": os.environ["PATH"],
                "PS1": _PROMPT.decode(),
                "TERM": "dumb",
                "HISTFILE": "",
            }
            os.closerange(3, 256)
            os.execve("/bin/bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self.seen = b""
        self.expect(_PROMPT)
        self.run("bind 'set enable-bracketed-paste off' 2>/dev/null; stty -echo")

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def expect(self, wanted: bytes, timeout_s: float = 60.0) -> bytes:
        """Read the screen until `wanted` is there; what came up to and with it."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted!r} is not on the screen: {self.seen!r}; {self.processes()}"
            if select.select([self.master], [], [], left)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 4096)
        found, self.seen = self.seen.split(wanted, 1)
        return found + wanted

    def processes(self) -> str:
        """What the shell and all below it do, for whoever reads that a test has failed."""
        found = []
        for pid in family_of(self.pid):
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                waits = Path(f"/proc/{pid}/syscall").read_text().split()[0]
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found.append(f"{pid} {stat[0]} group {stat[2]} of {stat[5]} in {waits}: {words[:6]}")
        return "\n".join([f"foreground: {os.tcgetpgrp(self.master)}", *found])

    def run(self, command: str) -> bytes:
        """Type a command and wait until the shell asks for the next one."""
        self.type(command.encode() + b"\n")
        return self.expect(_PROMPT)

    def settings(self) -> list[object]:
        return termios.tcgetattr(self.master)

    def wait_for_settings(self, wanted: list[object]) -> None:
        """Who has them at last is a shell, which sets them once more for each line that it reads."""
        deadline = time.monotonic() + 10
        while (found := self.settings()) != wanted:
            assert time.monotonic() < deadline, f"{found} is not {wanted}; {self.processes()}"
            time.sleep(0.01)

    def quit_key(self) -> bytes:
        """What no shell would change: the settings of the program are on if it is the program's."""
        return termios.tcgetattr(self.master)[6][termios.VQUIT]

    def wait_for_foreground(self, group: int) -> None:
        deadline = time.monotonic() + 60
        while os.tcgetpgrp(self.master) != group:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def wait_for_quit_key(self, key: bytes) -> None:
        deadline = time.monotonic() + 60
        while self.quit_key() != key:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def status(self) -> int:
        self.type(b"echo status=$?\n")
        self.expect(b"status=")
        return int(self.expect(_PROMPT).split()[0])

    def pipeline(self, *words: str | Path, program: str | Path = "-m pipeline") -> str:
        path = ":".join([str(ROOT), *(entry for entry in sys.path if "site-packages" in entry)])
        return f"PYTHONPATH={path} {self.python} {program} {' '.join(map(str, words))}"

    def close(self) -> None:
        family = family_of(self.pid)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(self.master)
        assert not reap(family)


@pytest.fixture
def shells(tmp_path: Path) -> Iterator[list[Shell]]:
    made: list[Shell] = []
    try:
        made.append(Shell(tmp_path))
        made.append(Shell(tmp_path))
        yield made
    finally:
        for shell in made:
            shell.close()


def begin(shell: Shell, code: str, directory: Path) -> int:
    """Start a program as the job of a shell; its pid."""
    script = directory / "job.py"
    script.write_text(code)
    shell.type(f"{find_python()} -S -s -E {script}\n".encode())
    found = re.search(rb"\[begun (\d+) (\d+)\]", shell.expect(b"]"))
    assert found
    assert found[1] == found[2], "the shell makes a group for each job"
    return int(found[1])


def begin_in_user_namespace(shell: Shell, directory: Path) -> int:
    """Start `_KEYS` in the group of a parent that stays outside; its pid."""
    script = directory / "job.py"
    script.write_text(_KEYS)
    run = shell.pipeline("run", "--userns=0:100000:65536", "--", find_python(), "-S", "-s", "-E", "-c")
    shell.type(f'{run} "$(cat {script})"\n'.encode())
    found = re.search(rb"\[begun (\d+) (\d+)\]", shell.expect(b"]"))
    assert found
    assert found[1] != found[2]
    return int(found[1])


def restorer_of(shell: Shell, pid: int) -> int:
    """Who has restored `pid` there."""
    (found,) = (one for one in family_of(shell.pid) if pid in children_of(one))
    return found


def wait_until_it_reads(pid: int) -> None:
    deadline = time.monotonic() + 60
    while not Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 "):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def restore_and_stop_the_restorer(shell: Shell, pid: int, image: Path) -> int:
    """Restore a job of `_KEYS` and stop the restorer alone, so that the shell takes the terminal; who it is."""
    shell.type(shell.pipeline("restore", "--from", image, "--shell-job").encode() + b"\n")
    shell.expect(b"[drawn]")
    shell.type(b"a")
    shell.expect(b"<a>")
    wait_until_it_reads(pid)
    restorer = restorer_of(shell, pid)
    os.kill(restorer, signal.SIGSTOP)
    shell.expect(b"Stopped")
    shell.expect(_PROMPT)
    shell.type(b" ")  # the read that waits already gets it
    shell.expect(b"< >")
    return restorer


def test_a_job_moves_to_another_shell_with_keys_interrupts_and_stops(
    shells: list[Shell], tmp_path: Path
) -> None:
    first, second = shells
    termios.tcsetwinsize(first.master, (33, 99))
    pid = begin(first, _KEYS, tmp_path)
    first.type(b"a")
    first.expect(b"<a>")
    assert first.quit_key() == b"\x05"
    image = tmp_path / "image"
    refused = engine("dump", "--pid", pid, "--to", image)
    assert refused.returncode == 3, said(refused)
    assert "--shell-job" in refused.stderr
    done = engine("dump", "--pid", pid, "--to", image, "--shell-job")
    assert done.returncode == 0, said(done)
    first.expect(_PROMPT)

    without = engine("restore", "--from", image)
    assert without.returncode == 3, said(without)
    assert "restore --shell-job" in without.stderr
    nowhere = engine("restore", "--from", image, "--shell-job")
    assert nowhere.returncode == 3, said(nowhere)
    assert "no controlling terminal" in nowhere.stderr
    assert engine("restore", "--from", image, "--shell-job", "--detach").returncode == 2

    usual = second.settings()
    second.type(second.pipeline("restore", "--from", image, "--shell-job").encode() + b"\n")
    second.expect(b"[drawn]")
    assert second.quit_key() == b"\x05"
    assert termios.tcgetwinsize(second.master) == (33, 99)  # it had none
    second.type(b"b")
    second.expect(b"<b>")
    second.type(b"\x03")
    second.expect(b"[interrupted]")
    second.type(b"\x1a")
    second.expect(b"Stopped")
    second.expect(_PROMPT)
    second.wait_for_settings(usual)
    assert b"alive" in second.run(f"kill -0 {pid} && echo alive")
    second.type(b"fg\n")
    second.expect(b"--shell-job")
    second.wait_for_quit_key(b"\x05")
    second.type(b"c")
    second.expect(b"<c>")
    second.type(b"q")
    second.expect(b"[end 1]")
    second.expect(_PROMPT)
    second.wait_for_settings(usual)
    assert termios.tcgetwinsize(second.master) == (0, 0)
    assert second.status() == 0
    assert not reap([pid])


def test_a_stopped_job_comes_back_stopped_and_reads_in_the_background_stop_it(
    shells: list[Shell], tmp_path: Path
) -> None:
    first, second = shells
    pid = begin(first, _KEYS, tmp_path)
    first.type(b"\x1a")
    first.expect(b"Stopped")
    first.expect(_PROMPT)
    image = tmp_path / "image"
    first.run(first.pipeline("dump", "--pid", pid, "--to", image, "--shell-job"))
    assert first.status() == 0
    usual = second.settings()
    second.type(second.pipeline("restore", "--from", image, "--shell-job").encode() + b"\n")
    second.expect(b"Stopped")
    second.expect(_PROMPT)
    second.wait_for_settings(usual)
    second.run("bg")
    second.run("sleep 0.3")
    assert b"Stopped" in second.run("jobs")  # it reads: the kernel stops it
    second.type(b"fg\n")
    second.expect(b"--shell-job")
    second.type(b"d\n")  # only its shell knew what it had set the terminal to
    second.expect(b"<d>")
    second.type(b"q\n")
    second.expect(b"[end 1]")
    second.expect(_PROMPT)
    second.wait_for_settings(usual)


def test_a_restorer_that_is_killed_leaves_a_terminal_as_it_was(shells: list[Shell], tmp_path: Path) -> None:
    first, second = shells
    pid = begin(first, _KEYS, tmp_path)
    image = tmp_path / "image"
    done = engine("dump", "--pid", pid, "--to", image, "--shell-job")
    assert done.returncode == 0, said(done)
    # a script, which does not care for the terminal itself
    (tmp_path / "script").write_text(
        second.pipeline("restore", "--from", image, "--shell-job", "--pidfile", tmp_path / "pid")
        + "\necho over; while test ! -e go; do sleep 0.05; done; read word; echo it is $word\n"
    )
    before = second.quit_key()
    second.type(b"sh ./script\n")
    second.expect(b"[drawn]")
    assert second.quit_key() == b"\x05" != before
    os.kill(restorer_of(second, pid), signal.SIGKILL)
    second.expect(b"over")
    second.wait_for_quit_key(before)
    os.kill(pid, signal.SIGKILL)
    assert not reap([pid])
    (tmp_path / "go").touch()
    second.type(b"mine\n")
    second.expect(b"it is mine")


def test_a_job_in_a_user_namespace_that_is_in_the_group_of_whoever_has_made_that(
    shells: list[Shell], tmp_path: Path
) -> None:
    """Its group is led from outside of the tree: it becomes a member of the restorer's."""
    first, second = shells
    pid = begin_in_user_namespace(first, tmp_path)
    done = engine("dump", "--pid", pid, "--to", tmp_path / "image", "--shell-job")
    assert done.returncode == 0, said(done)
    first.expect(_PROMPT)
    second.type(second.pipeline("restore", "--from", tmp_path / "image", "--shell-job").encode() + b"\n")
    second.expect(b"[drawn]")
    assert os.getpgid(pid) != pid
    for _ in range(2):
        second.type(b"\x03")
        second.expect(b"[interrupted]")
        second.type(b"\x1a")
        second.expect(b"Stopped")
        assert b"[interrupted]" not in second.expect(_PROMPT)
        assert second.quit_key() != b"\x05"
        second.type(b"fg\n")
        second.expect(b"--shell-job")
        second.wait_for_quit_key(b"\x05")
    second.type(b"q")
    second.expect(b"[end 1]")
    second.expect(_PROMPT)
    assert second.status() == 0


#: the pipeline, slow behind giving the terminal to the tree
_SLOWLY = """
import sys, time
from pipeline.cli.main import main
from pipeline.resources.shell_job import JobTerminal

give = JobTerminal._give

def slowly(self):
    give(self)
    time.sleep(0.5)

JobTerminal._give = slowly
sys.exit(main())
"""


def test_a_job_that_is_stopped_once_more_at_once_stays_stopped(shells: list[Shell], tmp_path: Path) -> None:
    """The shell has continued all of the group; the restorer, which comes a moment later, does not do so again."""
    first, second = shells
    pid = begin_in_user_namespace(first, tmp_path)
    done = engine("dump", "--pid", pid, "--to", tmp_path / "image", "--shell-job")
    assert done.returncode == 0, said(done)
    first.expect(_PROMPT)
    script = tmp_path / "slowly.py"
    script.write_text(_SLOWLY)
    words = ("restore", "--from", tmp_path / "image", "--shell-job")
    second.type(second.pipeline(*words, program=script).encode() + b"\n")
    second.expect(b"[drawn]")
    for _ in range(2):
        second.type(b"\x1a")
        second.expect(b"Stopped")
        second.expect(_PROMPT)
        second.type(b"fg\n")
        second.wait_for_quit_key(b"\x05")
    second.type(b"q")
    second.expect(b"[end 1]")
    second.expect(_PROMPT)
    assert second.status() == 0


def test_a_plain_user_has_jobs_too(temporary_directory: Path) -> None:
    """Around the tree there is a pid namespace; its first process is in the session, so that ^Z still works."""
    uid, directory = 7400, temporary_directory / "jobs"
    directory.mkdir()
    os.chown(directory, uid, uid)
    shell = Shell(directory, uid)
    try:
        pid = begin(shell, _KEYS, directory)
        shell.type(b"\x1a")
        shell.expect(b"Stopped")
        shell.expect(_PROMPT)
        said_by_dump = shell.run(shell.pipeline("dump", "--pid", pid, "--to", "image", "--shell-job"))
        assert shell.status() == 0, said_by_dump
        shell.type(shell.pipeline("restore", "--from", "image", "--shell-job").encode() + b"\n")
        shell.expect(b"Stopped")
        shell.expect(_PROMPT)
        shell.type(b"fg\n")
        shell.expect(b"--shell-job")
        shell.type(b"d\n")
        shell.expect(b"<d>")
        shell.type(b"\x03")
        shell.expect(b"[interrupted]")
        shell.type(b"\x1a")
        shell.expect(b"Stopped")
        shell.expect(_PROMPT)
        shell.type(b"fg\n")
        shell.expect(b"--shell-job")
        shell.type(b"q\n")
        shell.expect(b"[end 1]")
        shell.expect(_PROMPT)
        assert shell.status() == 0
    finally:
        shell.close()
        shutil.rmtree(directory)


def test_a_shell_in_a_shell_keeps_what_it_has_in_the_foreground(shells: list[Shell], tmp_path: Path) -> None:
    first, second = shells
    first.type(b"PS1='inner> ' bash --norc\n")
    first.expect(b"inner> ")
    first.type(b"sleep 1000\n")
    deadline = time.monotonic() + 60
    while len(family := family_of(first.pid)[1:]) < 2 or os.tcgetpgrp(first.master) != family[1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    done = engine("dump", "--pid", family[0], "--to", tmp_path / "image", "--shell-job")
    assert done.returncode == 0, said(done)
    assert not reap(family)
    second.type(second.pipeline("restore", "--from", tmp_path / "image", "--shell-job").encode() + b"\n")
    second.expect(b"total-time")
    second.wait_for_foreground(family[1])
    assert [os.getpgid(pid) for pid in family] == family
    assert {os.getsid(pid) for pid in family} == {second.pid}
    second.type(b"\x1a")
    second.expect(b"Stopped")
    second.expect(b"inner> ")
    second.type(b"fg\n")
    second.expect(b"sleep")
    second.wait_for_foreground(family[1])
    second.type(b"\x03")
    second.expect(b"inner> ")
    second.type(b"exit 7\n")
    second.expect(_PROMPT)
    assert second.status() == 7


_PARTS = """
import os, signal, subprocess, sys
os.write(1, b"[begun %d %d]" % (os.getpid(), os.getpgrp()))
first = subprocess.Popen(["cat"], stdout=subprocess.PIPE)
last = subprocess.Popen(["tr", "a-z", "A-Z"], stdin=first.stdout)
first.stdout.close()
os.write(1, b"[%d]" % last.wait())
"""


def test_a_pipeline_in_a_job(shells: list[Shell], tmp_path: Path) -> None:
    first, second = shells
    pid = begin(first, _PARTS, tmp_path)
    image = tmp_path / "image"
    deadline = time.monotonic() + 60
    while len(family := family_of(pid)) < 3:
        assert time.monotonic() < deadline
    done = engine("dump", "--pid", pid, "--to", image, "--shell-job")
    assert done.returncode == 0, said(done)
    assert not reap(family)
    second.type(second.pipeline("restore", "--from", image, "--shell-job").encode() + b"\n")
    second.expect(b"total-time")
    second.type(b"some words\n\x04")
    second.expect(b"SOME WORDS")
    second.expect(b"[0]")
    second.expect(_PROMPT)
    second.run("true")


def test_who_leads_the_session_of_a_terminal_outside_is_refused(shells: list[Shell], tmp_path: Path) -> None:
    shell, _ = shells
    done = engine("dump", "--pid", shell.pid, "--to", tmp_path / "image", "--shell-job")
    assert done.returncode == 3, said(done)
    assert "a terminal controls one session only" in done.stderr


def test_a_shell_that_has_taken_the_terminal_keeps_it(shells: list[Shell], tmp_path: Path) -> None:
    """SIGSTOP reaches the restorer alone: who is in the background behind that takes nothing from anybody."""
    first, second = shells
    pid = begin(first, _KEYS, tmp_path)
    image = tmp_path / "image"
    done = engine("dump", "--pid", pid, "--to", image, "--shell-job")
    assert done.returncode == 0, said(done)
    restore_and_stop_the_restorer(second, pid, image)
    second.run("bg")
    second.run("sleep 0.3")
    assert b"Stopped" in second.run("jobs")  # it reads
    assert os.tcgetpgrp(second.master) == second.pid
    second.run("stty quit ^X")
    second.type(b"fg\n")
    second.wait_for_quit_key(b"\x05")
    second.type(b"b")
    second.expect(b"<b>")
    second.type(b"q")
    second.expect(b"[end 1]")
    second.expect(_PROMPT)
    assert second.quit_key() == b"\x18"


def test_a_job_in_the_group_of_its_restorer_gets_its_settings_again(
    shells: list[Shell], tmp_path: Path
) -> None:
    """There the foreground does not tell that a shell has had the terminal meanwhile."""
    first, second = shells
    pid = begin_in_user_namespace(first, tmp_path)
    image = tmp_path / "image"
    done = engine("dump", "--pid", pid, "--to", image, "--shell-job")
    assert done.returncode == 0, said(done)
    usual = second.quit_key()
    restore_and_stop_the_restorer(second, pid, image)
    second.type(b"fg\n")
    second.wait_for_quit_key(b"\x05")
    second.type(b"b")
    second.expect(b"<b>")
    second.type(b"q")
    second.expect(b"[end 1]")
    second.expect(_PROMPT)
    assert second.quit_key() == usual


@pytest.mark.parametrize("how", ["by the terminal", "alone"])
def test_a_restorer_that_is_killed_when_it_is_stopped_leaves_a_terminal_to_the_shell(
    shells: list[Shell], tmp_path: Path, how: str
) -> None:
    first, second = shells
    pid = begin(first, _KEYS, tmp_path)
    image = tmp_path / "image"
    done = engine("dump", "--pid", pid, "--to", image, "--shell-job")
    assert done.returncode == 0, said(done)
    if how == "alone":
        restorer = restore_and_stop_the_restorer(second, pid, image)
    else:
        second.type(second.pipeline("restore", "--from", image, "--shell-job").encode() + b"\n")
        second.expect(b"[drawn]")
        restorer = restorer_of(second, pid)
        second.type(b"\x1a")
        second.expect(b"Stopped")
        second.expect(_PROMPT)
    guards = [one for one in children_of(restorer) if one != pid]
    second.run("stty quit ^X")
    os.kill(restorer, signal.SIGKILL)
    assert not reap([restorer, *guards])
    assert second.quit_key() == b"\x18"
    assert os.tcgetpgrp(second.master) == second.pid
    os.kill(pid, signal.SIGKILL)
    assert not reap([pid])


def test_a_terminal_is_given_by_the_main_thread_only() -> None:
    errors: list[BaseException] = []

    def give() -> None:
        try:
            JobTerminal(ShellJob(settings=b"", window=b"", foreground=None))
        except UsageError as error:
            errors.append(error)

    thread = threading.Thread(target=give)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])
    assert not [held for held in LEDGER.held() if held[0] == "terminal of the shell"]
