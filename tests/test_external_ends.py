"""Ends outside of the tree, as a person meets them: refused by name, carried when told so, given at the restore."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.tree import ROOT, children_of, engine, family_of, find_python, reap, said

pytestmark = pytest.mark.root

#: answers each line; says when its input ends
_ECHO = """
import os, sys
os.write(1, b"ready\\n")
for line in sys.stdin.buffer:
    os.write(1, b"got " + line)
os.write(1, b"end\\n")
"""
#: waits until it is told to look at its input
_LATE = """
import os, signal
signal.signal(signal.SIGUSR1, lambda *_: None)
os.write(1, b"ready\\n")
signal.pause()
said = b""
while not said.endswith(b"."):
    said += os.read(0, 100)
os.write(1, said + b"%d" % os.get_blocking(1) + os.read(0, 100))
os.write(1, b"end")
signal.pause()
"""


def receive(fd: int, wanted: bytes, timeout_s: float = 20.0) -> bytes:
    """Read until `wanted` has come, or the end."""
    found, deadline = b"", time.monotonic() + timeout_s
    while wanted not in found:
        assert select.select([fd], [], [], max(0, deadline - time.monotonic()))[0], (
            f"{wanted!r}, not {found!r}"
        )
        piece = os.read(fd, 4096)
        if not piece:
            break
        found += piece
    return found


class Program:
    """A program whose standard input and output are pipes of ours."""

    def __init__(self, code: str, **options: object) -> None:
        self.process = subprocess.Popen(
            [find_python(), "-S", "-s", "-E", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            **options,  # type: ignore[call-overload]
        )
        assert self.process.stdin
        assert self.process.stdout
        self.pid = self.process.pid
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        assert receive(self.stdout, b"ready\n") == b"ready\n"
        self.names = [os.readlink(f"/proc/{self.pid}/fd/{fd}") for fd in (0, 1)]

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self.process.wait()
        reap([self.pid])


@pytest.fixture
def program() -> Iterator[Callable[[str], Program]]:
    made: list[Program] = []

    def make(code: str) -> Program:
        made.append(Program(code))
        return made[-1]

    yield make
    for one in made:
        one.close()


@contextlib.contextmanager
def restorer(
    image: Path, *arguments: str, pass_fds: tuple[int, ...] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """`restore` in the foreground, with pipes of ours as its standard input and output."""
    command = [sys.executable, "-m", "pipeline", "restore", "--from", str(image), *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=pass_fds,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            for pid in reversed(family_of(process.pid)):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def test_an_end_outside_is_refused_by_name_and_comes_from_the_restorer_in_the_foreground(
    program: Callable[[str], Program], tmp_path: Path
) -> None:
    echo = program(_ECHO)
    image = tmp_path / "image"
    refused = engine("dump", "--pid", echo.pid, "--to", image)
    assert refused.returncode == 3, said(refused)
    for fd, name in enumerate(echo.names):
        assert f"pid {echo.pid} fd {fd} ({name})" in refused.stderr
        assert f"--external-fd '{name}'" in refused.stderr
    checked = engine("check", "--pid", echo.pid, "--external-fd", echo.names[0])
    assert checked.returncode == 3, said(checked)
    assert echo.names[0] not in checked.stdout
    assert echo.names[1] in checked.stdout
    os.write(echo.stdin, b"one\n")
    assert receive(echo.stdout, b"got one\n") == b"got one\n"
    done = engine("dump", "--pid", echo.pid, "--to", image, "--external-fd", "any")
    assert done.returncode == 0, said(done)
    assert all(name in done.stderr for name in echo.names), said(done)
    reap([echo.pid])
    assert os.read(echo.stdout, 10) == b""
    shown = json.loads(engine("inspect", image, "--json").stdout)
    assert shown["external-ends"] == {name: [[echo.pid, fd]] for fd, name in enumerate(echo.names)}

    detached = engine("restore", "--from", image, "--detach")
    assert detached.returncode == 3, said(detached)
    assert f"--inherit-fd '{echo.names[0]}=FD'" in detached.stderr
    wrong = engine("restore", "--from", image, "--inherit-fd", "pipe:[1]=/dev/null")
    assert wrong.returncode == 3, said(wrong)
    assert "no end outside of this name" in wrong.stderr

    with restorer(image) as process:
        assert process.stdin
        assert process.stdout
        os.write(process.stdin.fileno(), b"two\n")
        assert receive(process.stdout.fileno(), b"got two\n") == b"got two\n"
        process.stdin.close()
        process.stdin = None
        assert receive(process.stdout.fileno(), b"end\n") == b"end\n"
        assert process.wait(20) == 0
        assert process.stderr
        notes = process.stderr.read().decode()
        assert f"pid {echo.pid} fd 1 ({echo.names[1]}) is the stdout of this command" in notes


def test_an_end_is_given_by_number_or_path_and_unread_bytes_come_first(
    program: Callable[[str], Program], tmp_path: Path
) -> None:
    late = program(_LATE)
    os.write(late.stdin, b"unread")
    image, log = tmp_path / "image", tmp_path / "log"
    done = engine(
        "dump",
        "--pid",
        late.pid,
        "--to",
        image,
        "--external-fd",
        late.names[0],
        "--external-fd",
        late.names[1],
    )
    assert done.returncode == 0, said(done)
    reap([late.pid])
    log.write_bytes(b"before\n")

    reader, writer = os.pipe()
    given = ["--inherit-fd", f"{late.names[0]}={reader}", "--inherit-fd", f"{late.names[1]}={log}"]
    os.write(writer, b", early")
    with restorer(image, *given, "--detach", pass_fds=(reader,)) as process:
        assert process.wait(20) == 0
        assert process.stderr
        assert b"6 bytes that were not read yet come first" in process.stderr.read()
    pump = pump_of(reader)
    os.close(reader)
    os.write(writer, b", late.")
    os.kill(late.pid, signal.SIGUSR1)
    os.close(writer)
    deadline = time.monotonic() + 60
    while not log.read_bytes().endswith(b"end"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert log.read_bytes() == b"before\nunread, early, late.1end"
    assert not reap([pump])
    os.kill(late.pid, signal.SIGKILL)
    assert not reap([late.pid])


def pump_of(fd: int) -> int:
    """The process that passes on what comes out of a pipe."""
    name = os.readlink(f"/proc/self/fd/{fd}")
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended
                if Path(f"/proc/{pid}/comm").read_text() == "pipeline-pump\n" and any(
                    os.readlink(entry) == name for entry in Path(f"/proc/{pid}/fd").iterdir()
                ):
                    return int(pid)
        time.sleep(0.01)
    raise AssertionError("nobody passes on what is given")


def test_who_writes_learns_that_a_tree_with_unread_bytes_has_ended(
    program: Callable[[str], Program], tmp_path: Path
) -> None:
    late = program(_LATE)
    os.write(late.stdin, b"unread")
    done = engine("dump", "--pid", late.pid, "--to", tmp_path / "image", "--external-fd", "any")
    assert done.returncode == 0, said(done)
    reap([late.pid])
    with restorer(tmp_path / "image") as process:
        assert process.stdin
        assert process.stdout
        deadline = time.monotonic() + 20
        while late.pid not in family_of(process.pid):
            assert time.monotonic() < deadline
        pump = pump_of(process.stdin.fileno())
        os.kill(late.pid, signal.SIGKILL)
        assert process.wait(20) == 128 + signal.SIGKILL
        assert not reap([pump])
        with pytest.raises(BrokenPipeError):
            os.write(process.stdin.fileno(), b"x")


@pytest.mark.parametrize(
    "namespaces",
    [
        ["--userns=0:100000:65536", "--userns=0:1000:100"],
        ["--userns=0:100000:65536", "--pidns", "--mntns", "--ipcns", "--utsns"],
    ],
    ids=["depth2", "container"],
)
def test_ends_of_a_tree_in_namespaces(tmp_path: Path, namespaces: list[str]) -> None:
    run = [sys.executable, "-m", "pipeline", "run", *namespaces, "--", find_python(), "-S", "-s", "-E", "-c"]
    with subprocess.Popen(
        [*run, _ECHO], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as around:
        assert around.stdout
        receive(around.stdout.fileno(), b"ready\n")
        (pid,) = children_of(around.pid)
        done = engine("dump", "--pid", pid, "--to", tmp_path / "image", "--external-fd", "any")
        assert done.returncode == 0, said(done)
        around.wait()
    with restorer(tmp_path / "image") as process:
        assert process.stdin
        assert process.stdout
        os.write(process.stdin.fileno(), b"two\n")
        assert receive(process.stdout.fileno(), b"got two\n") == b"got two\n"
        process.stdin.close()
        process.stdin = None
        assert receive(process.stdout.fileno(), b"end\n") == b"end\n"
        assert process.wait(20) == 0


def test_a_name_that_is_said_must_fit(program: Callable[[str], Program], tmp_path: Path) -> None:
    echo = program(_ECHO)
    done = engine(
        "dump", "--pid", echo.pid, "--to", tmp_path / "i", "--external-fd", "any", "--external-fd", "pipe:[1]"
    )
    assert done.returncode == 3, said(done)
    assert "--external-fd pipe:[1]: no open file of the tree has this name" in done.stderr
    assert engine("dump", "--pid", echo.pid, "--to", tmp_path / "i", "--external-fd", "x").returncode == 2
    for wrong in ("pipe:[1]", "=5", "pipe:[1]=999"):
        assert engine("restore", "--from", tmp_path / "i", "--inherit-fd", wrong).returncode == 2


def test_a_socket_that_somebody_outside_has_made(tmp_path: Path) -> None:
    """As of a service that is started for a connection: named, and given at the restore."""
    theirs, ours = socket.socketpair()
    process = subprocess.Popen(
        [find_python(), "-S", "-s", "-E", "-c", _ECHO],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    name = os.readlink(f"/proc/self/fd/{theirs.fileno()}")
    theirs.close()
    try:
        receive(ours.fileno(), b"ready")
        assert engine("dump", "--pid", process.pid, "--to", tmp_path / "image").returncode == 3
        done = engine("dump", "--pid", process.pid, "--to", tmp_path / "image", "--external-fd", name)
        assert done.returncode == 0, said(done)
        process.wait()
        with ours, restorer(tmp_path / "image", "--inherit-fd", f"{name}=77", pass_fds=()) as wrong:
            assert wrong.wait(20) == 2
        new, ours = socket.socketpair()
        with (
            new,
            restorer(
                tmp_path / "image", "--inherit-fd", f"{name}={new.fileno()}", pass_fds=(new.fileno(),)
            ) as again,
        ):
            new.close()
            ours.sendall(b"hello\n")
            receive(ours.fileno(), b"got hello\n")
            ours.shutdown(socket.SHUT_WR)
            receive(ours.fileno(), b"end\n")
            assert again.wait(20) == 0
            assert ours.recv(1) == b""
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        reap([process.pid])


#: sockets that are joined to each other; its output says which
_JOINED = """
import os, signal, socket
def listener(address):
    made = socket.create_server(("127.0.0.1", 0)) if address is None else socket.socket(socket.AF_UNIX)
    if address is not None:
        made.bind(address)
        made.listen()
    client = socket.socket(made.family)
    client.connect(made.getsockname())
    return made, client
pair = socket.socketpair()
tcp, waits = listener(None)
ours, _ = listener(None)
theirs = ours.accept()[0]
unix, waits_there = listener("\\0pipeline-joined-%d" % os.getpid())
server, client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
server.bind("\\0pipeline-asked-%d" % os.getpid())
client.connect(server.getsockname())
alone = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
joined = *pair, tcp, waits, theirs, unix, waits_there, server, client
for one in (*joined, ours, alone):
    os.write(1, os.readlink(f"/proc/self/fd/{one.fileno()}").encode() + b" ")
os.write(1, b"ready\\n")
signal.pause()
"""


def test_a_socket_that_is_joined_to_another_one_of_the_tree_is_no_end_outside() -> None:
    with subprocess.Popen(
        [find_python(), "-S", "-s", "-E", "-c", _JOINED],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    ) as program:
        try:
            assert program.stdout
            *joined, ours, alone = receive(program.stdout.fileno(), b"ready\n").decode().split()[:-1]
            for named in (joined, joined[::2], joined[1::2]):
                options = [word for name in (*named, ours, alone) for word in ("--external-fd", name)]
                checked = engine("check", "--pid", program.pid, "--external-fd", "any", *options)
                assert checked.returncode == 3, said(checked)
                wrong = {line for line in checked.stdout.splitlines() if "is said to be external" in line}
                assert all("is joined to another socket of the tree" in line for line in wrong)
                refused = {
                    name for name in (*joined, ours, alone) if any(f"({name})" in line for line in wrong)
                }
                assert refused == set(named)
            # sockets are not meant by this word, and do not hinder it
            checked = engine("check", "--pid", program.pid, "--external-fd", "any")
            assert "is said to be external" not in checked.stdout, said(checked)
            assert checked.returncode == 0, said(checked)
        finally:
            program.kill()


def test_a_connection_that_is_given_again_is_not_held_meanwhile(tmp_path: Path) -> None:
    """Somebody outside holds it, too, and goes on with it while the tree, which listens itself, is nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname(), timeout=20)
        theirs = listener.accept()[0]
    code = "import socket\nown = socket.create_server(('127.0.0.1', 0))\n" + _ECHO
    with ours, theirs:
        process = subprocess.Popen(
            [find_python(), "-S", "-s", "-E", "-c", code],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        name = os.readlink(f"/proc/self/fd/{theirs.fileno()}")
        try:
            receive(ours.fileno(), b"ready\n")
            named = ("--external-fd", name, "--external-fd", "any")
            done = engine("dump", "--pid", process.pid, "--to", tmp_path / "image", *named)
            assert done.returncode == 0, said(done)
            process.wait()
            theirs.sendall(b"meanwhile")
            assert receive(ours.fileno(), b"meanwhile") == b"meanwhile"
            ours.sendall(b"hello\n")
            given = ("--inherit-fd", f"{name}={theirs.fileno()}")
            with restorer(tmp_path / "image", *given, pass_fds=(theirs.fileno(),)) as again:
                assert receive(ours.fileno(), b"got hello\n") == b"got hello\n"
                os.kill(process.pid, signal.SIGKILL)
                assert again.wait(20) == 128 + signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            reap([process.pid])


_ALONE = """
import os, signal
reader, writer = os.pipe()
os.write(1, b"ready\\n")
signal.pause()
"""


def test_a_pipe_of_the_tree_alone_is_no_end_outside(
    program: Callable[[str], Program], tmp_path: Path
) -> None:
    alone = program(_ALONE)
    inner = next(
        link
        for fd in os.listdir(f"/proc/{alone.pid}/fd")
        if (link := os.readlink(f"/proc/{alone.pid}/fd/{fd}")).startswith("pipe:") and link not in alone.names
    )
    done = engine(
        "dump", "--pid", alone.pid, "--to", tmp_path / "i", "--external-fd", "any", "--external-fd", inner
    )
    assert done.returncode == 3, said(done)
    assert "has no end outside of the tree, and is said to be external" in done.stderr


_FIFO = """
import os, sys
reader = os.open(sys.argv[1], os.O_RDONLY)
os.write(1, b"ready\\n")
os.read(0, 1)
os.write(1, os.read(reader, 100))
"""


def test_a_fifo_is_found_by_its_name_with_what_was_not_read(tmp_path: Path) -> None:
    """Somebody outside writes into it and holds it open: what waits is there already, and is not doubled."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    keeper = os.open(path, os.O_RDWR)
    writer = os.open(path, os.O_WRONLY)
    os.close(keeper)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    program = Program(_FIFO.replace("sys.argv[1]", repr(str(path))))
    os.close(reader)
    try:
        os.write(writer, b"through")
        done = engine("dump", "--pid", program.pid, "--to", tmp_path / "image", "--external-fd", "any")
        assert done.returncode == 0, said(done)
        reap([program.pid])
        with restorer(tmp_path / "image") as process:
            assert process.stdin
            assert process.stdout
            os.write(process.stdin.fileno(), b"x")
            assert receive(process.stdout.fileno(), b"through") == b"through"
            assert process.wait(20) == 0
    finally:
        program.close()
        os.close(writer)


def test_a_terminal_outside_that_controls_nothing(tmp_path: Path) -> None:
    """A tree in a session of its own, whose output is somebody's terminal."""
    master, slave = os.openpty()
    process = subprocess.Popen(
        [find_python(), "-S", "-s", "-E", "-c", _ECHO],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    other_master, other_slave = os.openpty()
    try:
        receive(master, b"ready")
        name = f"tty:{os.ttyname(slave)}"
        refused = engine("dump", "--pid", process.pid, "--to", tmp_path / "image")
        assert refused.returncode == 3, said(refused)
        done = engine("dump", "--pid", process.pid, "--to", tmp_path / "image", "--external-fd", name)
        assert done.returncode == 0, said(done)
        process.wait()
        given = f"{name}={os.ttyname(other_slave)}"
        back = engine("restore", "--from", tmp_path / "image", "--detach", "--inherit-fd", given)
        assert back.returncode == 0, said(back)
        os.write(other_master, b"hello\n")
        receive(other_master, b"got hello")
        os.write(other_master, b"\x04")
        receive(other_master, b"end")
        assert not reap([process.pid])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        reap([process.pid])
        for fd in (master, slave, other_master, other_slave):
            os.close(fd)


def test_serve_is_given_the_ends_of_a_tree_that_comes_over_the_wire(
    program: Callable[[str], Program], tmp_path: Path
) -> None:
    """Without what it needs it is refused, and runs on where it was."""
    late, secret, log = program(_LATE), tmp_path / "secret", tmp_path / "log"
    secret.touch(mode=0o600)
    secret.write_text("0123456789abcdef" * 4)
    os.write(late.stdin, b"unread")
    tool = [
        sys.executable,
        "-m",
        "pipeline",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--new-pidns",
        "--plaintext",
    ]
    tool += ["--secret-file", str(secret), "--once", "--inherit-fd", f"{late.names[1]}={log}"]
    reader, writer = os.pipe()
    os.write(writer, b", and more.")
    os.close(writer)

    def migrate(*more: str) -> subprocess.CompletedProcess[str]:
        with subprocess.Popen(
            [*tool, *more], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(reader,)
        ) as server:
            assert server.stdout
            to = server.stdout.readline().decode().split()[-1]
            done = engine(
                *("migrate", "--pid", late.pid, "--to", to, "--secret-file", secret, "--plaintext"),
                *("--external-fd", "any"),
            )
            if done.returncode:
                server.send_signal(signal.SIGTERM)
                server.communicate()
                return done
            root = int(server.stdout.readline().split()[-1])
            deadline = time.monotonic() + 60
            os.kill(root, signal.SIGUSR1)
            while not log.exists() or not log.read_bytes().endswith(b"end"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(root, signal.SIGKILL)
            server.communicate(timeout=20)
            assert not reap([root])
        return done

    refused = migrate()
    assert refused.returncode == 1, said(refused)
    assert f"--inherit-fd '{late.names[0]}=FD'" in refused.stderr
    assert late.process.poll() is None
    done = migrate("--inherit-fd", f"{late.names[0]}={reader}")
    assert done.returncode == 0, said(done)
    os.close(reader)
    assert log.read_bytes() == b"unread, and more.1end"
