"""Programs that nobody wrote for it, started by a plain user with common tools: carried twice, and they go on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness import huge_pages
from tests.harness.tree import Workshop, family_of, reap, said
from tests.harness.users import User, Users

pytestmark = pytest.mark.root  # root becomes the user

ALICE = User("alice", 61_301, 62_301)
CONTAINER = ["unshare", "-U", "-r", "-p", "-f", "-m", "--mount-proc"]
ROOT_INSIDE = ["unshare", "-U", "-r"]
#: two threads talk by TCP, and count
TALK = """
import socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
def answer():
    while True:
        server.sendall(server.recv(100))
threading.Thread(target=answer, daemon=True).start()
number = 0
while True:
    number += 1
    client.sendall(b"%d" % number)
    found = client.recv(100)
    if found != b"%d" % number:
        raise SystemExit(f"{found} is no answer to {number}")
    print(number, flush=True)
    time.sleep(0.01)
"""
COUNT = "i=0; while sleep 0.02; do i=$((i+1)); echo $i; done"

COUNT_IN_A_MEMFD = """
import mmap, os, struct, time
fd = os.memfd_create("number")
os.ftruncate(fd, 4096)
memory = mmap.mmap(fd, 4096)
for number in range(1 << 30):
    struct.pack_into("<q", memory, 0, number)
    if os.pread(fd, 8, 0) != struct.pack("<q", number):
        raise SystemExit("file and mapping are not the same")
    print(number, flush=True)
    time.sleep(0.02)
"""

#: nobody but root can open it any more; one mapping shows what goes through the other
COUNT_IN_A_CLOSED_MEMFD = """
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
fd = os.memfd_create("number")
os.ftruncate(fd, 3 * 4096)
os.pwrite(fd, b"written", 2 * 4096)
whole, part = libc.mmap(None, 3 * 4096, 3, 1, fd, 0), libc.mmap(None, 4096, 1, 1, fd, 4096)
os.close(fd)
for number in range(1 << 30):
    ctypes.c_long.from_address(whole + 4096).value = number
    if ctypes.c_long.from_address(part).value != number or ctypes.string_at(whole + 2 * 4096) != b"written":
        raise SystemExit("the mappings do not show the same, or not what was written")
    print(number, flush=True)
    time.sleep(0.02)
"""

WATCH = """import ctypes, os
libc = ctypes.CDLL(None)
fd = libc.inotify_init()
assert libc.inotify_add_watch(fd, b"watched", 0x100) == 1
while True:
    os.read(fd, 4096)
    print("seen", flush=True)
"""
MAKE_FILES = """cd $(mktemp -d); mkdir watched
while sleep 0.05; do : >watched/file; rm watched/file; done & exec python3 -c "$0\""""

#: command lines whose output grows as long as they run
COUNTING: dict[str, Sequence[str]] = {
    "in the host's pid namespace": ["sh", "-c", COUNT],
    "unshare -c": ["unshare", "-c", "sh", "-c", COUNT],
    "perl": [
        *ROOT_INSIDE,
        "perl",
        "-e",
        "$|=1; while(1){ print ++$i, qq{\\n}; select(undef,undef,undef,0.02) }",
    ],
    "a pipeline": [*ROOT_INSIDE, "sh", "-c", f"{{ {COUNT}; }} | sed -u s/^/n/ | cat"],
    "bash with jobs": [*CONTAINER, "bash", "-c", f"set -m; sleep 1000 & ( {COUNT} ) & fg 2"],
    "a container": [*CONTAINER, "sh", "-c", COUNT],
    "three levels": [*ROOT_INSIDE, *ROOT_INSIDE, "unshare", "-U", "-c", "-m", "sh", "-c", COUNT],
    "a connection in a network of its own": [
        *(*ROOT_INSIDE, "unshare", "-n", "sh", "-c"),
        'PATH=$PATH:/usr/sbin:/sbin; ip link set lo up; exec python3 -u -c "$0"',
        TALK,
    ],
    "setpriv": [*ROOT_INSIDE, "setpriv", "--no-new-privs", "--bounding-set=-all", "sh", "-c", COUNT],
    # which a plain user may open by a descriptor only
    "a memfd that is mapped": ["python3", "-u", "-c", COUNT_IN_A_MEMFD],
    "a memfd that is mapped and closed": ["python3", "-u", "-c", COUNT_IN_A_CLOSED_MEMFD],
    # a watch of inotify on a file that is deleted, but open
    "tail -f": ["sh", "-c", f"f=$(mktemp); ({COUNT}) >$f & tail -f $f & sleep 0.2; rm $f; wait"],
    # and on a directory, whose name a plain user has to search for
    "a watched directory": [*ROOT_INSIDE, "sh", "-c", MAKE_FILES, WATCH],
    "bwrap": ["bwrap", "--unshare-user", "--bind", "/", "/", "sh", "-c", COUNT],
    # its root is a directory of a tmpfs that nobody sees any more
    "a sandbox of bwrap": [
        *(
            "bwrap",
            "--unshare-all",
            "--ro-bind",
            "/usr",
            "/usr",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--tmpfs",
            "/tmp",
        ),
        *(word for name in ("bin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")),
        *("sh", "-c", COUNT),
    ],
}


class Carried:
    """A command line of the user, detached, which writes into a file."""

    def __init__(self, users: Users, place: Path, command: Sequence[str]) -> None:
        self.users, self.place = users, place
        os.chown(place, ALICE.uid, ALICE.gid)
        self.output = place / "output"
        with self.output.open("wb") as output:
            os.chown(self.output, ALICE.uid, ALICE.gid)
            self._first = subprocess.Popen(
                users.command(ALICE, "env", f"TMPDIR={place}", *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.pid = self._first.pid

    def goes_on(self) -> None:
        """Its output grows."""
        size, deadline = self.output.stat().st_size, time.monotonic() + 60
        while self.output.stat().st_size <= size:
            assert time.monotonic() < deadline, f"it stands still: {self.output.read_text()}"
            time.sleep(0.01)

    def carry(self, *options: str) -> None:
        """Dumped and restored by the user."""
        family, image = family_of(self.pid), self.place / "image"
        done = self.users.engine(ALICE, "dump", "--pid", str(self.pid), "--to", image)
        assert done.returncode == 0, said(done)
        self._first.poll()
        assert not reap(family)
        done = self.users.engine(ALICE, "restore", "--from", image, "--detach", *options)
        assert done.returncode == 0, said(done)
        self.pid = int(done.stdout)
        shutil.rmtree(image)

    def end(self) -> None:
        family = family_of(self.pid)
        for pid in family:
            with suppress(ProcessLookupError):  # with one of them others end
                os.kill(pid, signal.SIGKILL)
        reap(family)
        self._first.poll()


@pytest.fixture
def carried(nothing_left_behind: None, workshop: Workshop) -> Iterator[Callable[[Sequence[str]], Carried]]:
    users, started = Users(workshop.directory(), ALICE), []

    def start(command: Sequence[str]) -> Carried:
        started.append(Carried(users, workshop.directory(), command))
        return started[-1]

    try:
        yield start
    finally:
        for one in started:
            one.end()
        users.close()


@pytest.mark.parametrize("name", COUNTING)
def test_a_program_goes_on(carried: Callable[[Sequence[str]], Carried], name: str) -> None:
    command = COUNTING[name]
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} (Debian: apt-get install bubblewrap)")
    program = carried(command)
    program.goes_on()
    for options in ([], ["--new-pidns"]):
        program.carry(*options)
        program.goes_on()


def test_an_http_server_answers(carried: Callable[[Sequence[str]], Carried]) -> None:
    program = carried([*CONTAINER, "python3", "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"])
    deadline = time.monotonic() + 20
    while " port " not in program.output.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = program.output.read_text().split(" port ")[1].split()[0]

    def ask() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            return int(answer.status)

    assert ask() == 200
    for _ in range(2):
        program.carry()
        assert ask() == 200


def test_a_connection_in_the_network_of_the_host_is_refused(
    carried: Callable[[Sequence[str]], Carried],
) -> None:
    program = carried(["python3", "-u", "-c", TALK])
    program.goes_on()
    done = program.users.engine(ALICE, "check", "--pid", str(program.pid))
    assert done.returncode == 3, said(done)
    assert "it takes CAP_NET_ADMIN in its network to look at it" in done.stdout
    done = program.users.engine(ALICE, "dump", "--pid", str(program.pid), "--to", program.place / "image")
    assert done.returncode == 3, said(done)
    assert "give the tree a network of its own, or give --tcp close" in done.stderr
    program.goes_on()


@pytest.mark.parametrize(
    ("program", "roles"), [("file_states", ("main", "ranges")), ("huge_pages", ("main", "child"))]
)
def test_rare_states_are_the_same_inside(
    carried: Callable[[Sequence[str]], Carried], workshop: Workshop, program: str, roles: tuple[str, str]
) -> None:
    """What a test program checks, with an engine that has no privileges outside."""
    huge_pages.skip_without(program)
    place = workshop.directory()
    tree = carried([*ROOT_INSIDE, *workshop.command(program), str(place)])
    deadline = time.monotonic() + 60
    while not (place / "ready.main").exists():
        assert time.monotonic() < deadline, tree.output.read_text()
        time.sleep(0.01)
    tree.carry("--new-pidns")
    (place / ".request").write_text("check")
    (place / ".request").rename(place / "request.1")
    while not all((place / f"answer.1.{role}").exists() for role in roles):
        assert time.monotonic() < deadline + 20, tree.output.read_text()
        time.sleep(0.01)
    assert [(place / f"answer.1.{role}").read_text() for role in roles] == ["", ""]
