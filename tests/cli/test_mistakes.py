"""What a plain user gets wrong, and places that fail: the message says what happened, to whom, and what to do.

Exit codes are those of the README, the tree runs on, and nothing is left behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness.hosts import write_secret
from tests.harness.tree import Workshop, reap
from tests.harness.users import User, Users

pytestmark = pytest.mark.root  # root becomes the user

ALICE = User("alice", 61_301, 62_301)

Engine = Callable[..., subprocess.CompletedProcess[str]]


class Case:
    """A user, a place of their own, and a tree that runs."""

    def __init__(self, users: Users, place: Path) -> None:
        self.users, self.place = users, place
        os.chown(place, ALICE.uid, ALICE.gid)
        place.chmod(0o755)
        secret = write_secret(place / "secret")
        os.chown(secret, ALICE.uid, ALICE.gid)
        done = users.engine(ALICE, "run", "--userns", "--detach", "--", "sleep", "1000")
        assert done.returncode == 0, done.stderr
        self.pid = int(done.stdout)

    def engine(self, *words: str | Path) -> tuple[int, str]:
        """Exit code and what was said on stderr; ``PID`` stands for the tree."""
        done = self.users.engine(ALICE, *(str(self.pid) if word == "PID" else word for word in words))
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    def command(self, *words: str | Path) -> list[str]:
        return self.users.engine_command(ALICE, *words)

    def runs(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"

    def image(self) -> Path:
        image = self.place / "image"
        code, said = self.engine("dump", "--pid", "PID", "--to", image, "--leave-running")
        assert code == 0, said
        return image


@pytest.fixture
def case(nothing_left_behind: None, workshop: Workshop) -> Iterator[Case]:
    users = Users(workshop.directory(), ALICE)
    try:
        case = Case(users, workshop.directory())
        try:
            yield case
            assert case.runs()
        finally:
            os.kill(case.pid, signal.SIGKILL)
            reap([case.pid])
    finally:
        users.close()


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("/root/image", "/root/image: Permission denied: uid 61301 may not"),
        ("/etc/image", "no file can be made in /etc; give --to another place"),
        ("/etc/image/deeper", "no file can be made in /etc; give --to another place"),
        ("/etc/passwd", "/etc/passwd is not a directory"),
        ("/etc/passwd/image", "/etc/passwd/image is not a directory"),
        ("/etc", "/etc is not empty"),
        ("file://elsewhere/image", "names a path of this host"),
    ],
)
def test_a_place_where_no_image_can_be(case: Case, to: str, words: str) -> None:
    code, said = case.engine("dump", "--pid", "PID", "--to", to)
    assert code == 2, said
    assert words in said


def test_a_disk_that_is_full(case: Case) -> None:
    """A tmpfs of 64 KiB in the mount namespace of the users."""
    disk = case.place / "disk"
    disk.mkdir()
    within = case.command("check")
    enter = within[: within.index("--") + 1]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "none", disk], check=True)
    code, said = case.engine("dump", "--pid", "PID", "--to", disk / "image")
    assert code == 1, said
    assert "no space left on device; free some, or give --to another place" in said
    left = subprocess.run([*enter, "ls", "-A", disk], capture_output=True, text=True, check=True).stdout
    assert left == ""


def test_what_is_no_image_or_half_of_one(case: Case) -> None:
    image = case.image()
    size = (image / "image").stat().st_size
    code, said = case.engine("restore", "--from", case.place / "secret")
    assert (code, "an image is a directory, and this is none" in said) == (1, True), said
    os.truncate(image / "image", size // 2)
    code, said = case.engine("restore", "--from", image)
    assert (code, "it is truncated" in said) == (1, True), said
    (image / "image").chmod(0o600)
    os.chown(image / "image", 0, 0)
    code, said = case.engine("restore", "--from", image)
    assert (code, "may not do that; chmod or chown it" in said) == (1, True), said
    (image / "manifest").unlink()
    code, said = case.engine("restore", "--from", image)
    assert (code, "the image is not complete" in said) == (1, True), said


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("nobody.invalid:7000", "give a name that this host knows"),
        ("127.0.0.1:1", "Connection refused; is `serve` running there?"),
    ],
)
def test_a_destination_that_is_not_there(case: Case, to: str, words: str) -> None:
    secret = case.place / "secret"
    code, said = case.engine("migrate", "--pid", "PID", "--to", to, "--secret-file", secret)
    assert code == 1, said
    assert words in said


def test_a_place_to_listen_that_cannot_be_had(case: Case) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        for listen, words in (
            (f"127.0.0.1:{port}", "another program listens there"),
            ("127.0.0.1:80", "only root may have that port"),
            ("192.0.2.1:7000", "no address of this host"),
            ("nobody.invalid:7000", "give an address of this host"),
        ):
            code, said = case.engine("serve", "--listen", listen, "--secret-file", case.place / "secret")
            assert code == 2, said
            assert words in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_restore_that_is_given_up_half_way(case: Case, number: signal.Signals) -> None:
    content = (case.image() / "image").read_bytes()
    events = case.place / "events"
    command = case.command("restore", "--from", "-", "--events", events)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as restore:
        assert restore.stdin is not None
        assert restore.stderr is not None
        restore.stdin.write(content[:-2_000])
        restore.stdin.flush()
        deadline = time.monotonic() + 60
        while not events.exists() or '"setup"' not in events.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        restore.send_signal(number)
        assert restore.wait(60) == 128 + number
        assert b"rolling back" in restore.stderr.read()


def test_a_migration_that_is_given_up_while_nobody_answers(case: Case) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        to = f"127.0.0.1:{silent.getsockname()[1]}"
        options = ["--to", to, "--secret-file", str(case.place / "secret")]
        command = case.command("migrate", "--pid", str(case.pid), *options)
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as migrate:
            assert migrate.stderr is not None
            with closing(silent.accept()[0]):
                migrate.send_signal(signal.SIGINT)
                assert migrate.wait(60) == 130
                assert b"rolling back" in migrate.stderr.read()
