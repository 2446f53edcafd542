"""Plain users with newuidmap and ranges in /etc/subuid: their trees have whole maps, and keep them wherever they go."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.hosts import write_secret
from tests.harness.settings import DEPTH_0
from tests.harness.tree import Tree, Workshop, reap, said
from tests.harness.users import User, Users
from tests.topologies.catalogue import fork, ids, ns, user

pytestmark = [
    pytest.mark.root,  # root becomes the users
    pytest.mark.skipif(not shutil.which("newuidmap"), reason="needs newuidmap (Debian: uidmap)"),
]

ALICE = User("alice", 61_301, 62_301, [(300_000, 65_536)], [(400_000, 65_536)])
BOB = User("bob", 61_302, 62_302, [(500_000, 1_000), (510_000, 65_536)], [(600_000, 65_536)])
CAROL = User("carol", 61_303, 62_303)
DAVE = User("dave", 61_304, 62_304)

STEPS = [
    fork("one", ids(33, 44, [55, 66])),
    fork("two", ids(1000, 1000), user("0 1000 100", "0 2000 100"), fork("below", ids(9, 9))),
    ns("uts"),
]


@pytest.fixture
def users(nothing_left_behind: None, workshop: Workshop) -> Iterator[Users]:
    users = Users(workshop.directory(), ALICE, BOB, CAROL, DAVE)
    try:
        yield users
    finally:
        users.close()


@pytest.fixture
def begin(users: Users, workshop: Workshop) -> Iterator[Callable[..., Tree]]:
    """Start a program as a user by `run`: ``begin(user, map, program, arguments)``; killed at the end."""
    trees: list[Tree] = []

    def begin(owner: User, lines: str, program: str, *arguments: str, inner: Sequence[str] = ()) -> Tree:
        options = ["--pidns", "--mntns", f"--userns={lines}" if lines else "--userns"]
        # `run` says how the tree ended, once it is dumped: not in the log, which the tree has open
        quiet = ["sh", "-c", 'exec 9>&2; exec "$@" 2>/dev/null', "sh"]
        again = ["sh", "-c", 'exec "$@" 2>&9 9>&-', "sh"]
        within = [*quiet, *users.engine_command(owner, "run", *options, "--"), *again, *inner]
        trees.append(Tree.start(workshop, program, DEPTH_0, arguments, within))
        return trees[-1]

    yield begin
    for tree in trees:
        tree.kill()


def maps_of(pid: int) -> list[list[str]]:
    return [Path(f"/proc/{pid}/{name}").read_text().split() for name in ("uid_map", "gid_map")]


def dump(users: Users, owner: User, tree: Tree) -> Path:
    """Dump it as its user, into an image that every user can read."""
    family, image = tree.pids(), tree.directory / "image"
    done = users.engine(owner, "dump", "--pid", str(tree.pid), "--to", image)
    assert done.returncode == 0, said(done)
    assert not reap(family), "the dump left the tree running"
    for path in (image, *image.iterdir()):
        path.chmod(0o755)
    return image


def restore(users: Users, owner: User, tree: Tree, image: Path, *options: str) -> None:
    done = users.engine(owner, "restore", "--from", image, "--detach", *options)
    assert done.returncode == 0, said(done)
    tree.pid = int(done.stdout)


def test_maps_of_a_plain_user_are_whole_again(users: Users, begin: Callable[..., Tree]) -> None:
    tree = begin(ALICE, "auto", "topology", json.dumps(STEPS))
    before = [maps_of(pid) for pid in tree.pids()]
    assert before[0] == [
        ["0", "61301", "1", "1", "300000", "65536"],
        ["0", "62301", "1", "1", "400000", "65536"],
    ]
    for _ in range(2):  # what was restored is dumped like any other
        restore(users, ALICE, tree, dump(users, ALICE, tree))
        other = users.engine(BOB, "dump", "--pid", str(tree.pid), "--to", tree.directory / "other")
        assert (other.returncode, "it runs for another user" in other.stderr) == (3, True), said(other)
        assert [maps_of(pid) for pid in tree.pids()] == before
        assert Path(f"/proc/{tree.pid}/setgroups").read_text() == "allow\n"
        tree.check()
        shutil.rmtree(tree.directory / "image")


#: becomes an id of the range, without anything that its user might open as itself
AS_33 = ["sh", "-c", 'umask 077; exec setpriv --reuid=33 --regid=33 --clear-groups "$@"', "sh"]


@pytest.mark.parametrize("program", ["anonymous", "pipes", "sockets"])
def test_files_and_memory_of_an_id_of_the_range_are_carried_twice(
    users: Users, begin: Callable[..., Tree], program: str
) -> None:
    tree = begin(ALICE, "auto", program, inner=AS_33)
    assert Path(f"/proc/{tree.pid}/fd").stat().st_uid == 300_032
    for _ in range(2):
        restore(users, ALICE, tree, dump(users, ALICE, tree))
        shutil.rmtree(tree.directory / "image")
    tree.check()


#: in a directory of its own: a file, one without a name, and memory that is shared
PRIVATE = """
import mmap, os, tempfile, time
os.mkdir("own"); os.chdir("own")
named, unnamed, memory = open("named", "w+"), tempfile.TemporaryFile(dir="."), mmap.mmap(-1, 4096)
mapped = mmap.mmap(os.open("named", os.O_RDWR | os.O_CREAT), 0) if named.write("0" * 8) and not named.flush() else None
while True:
    count = int.from_bytes(memory[:4], "little") + 1
    memory[:4] = count.to_bytes(4, "little")
    assert unnamed.seek(0) == 0 and int(unnamed.read() or count - 1) == count - 1
    unnamed.seek(0); unnamed.write(b"%d" % count); unnamed.flush()
    mapped[:] = b"%8d" % count
    time.sleep(0.01)
"""


def test_private_files_of_an_id_of_the_range_are_carried_twice(users: Users, workshop: Workshop) -> None:
    place = workshop.directory()
    script = [f'cd {place}; umask 077; exec setpriv --reuid=33 --regid=33 --clear-groups "$@"', "sh"]
    options = ["--pidns", "--mntns", "--detach", "--userns=auto"]
    done = users.engine(ALICE, "run", *options, "--", "sh", "-c", *script, users.python, "-SEc", PRIVATE)
    assert done.returncode == 0, said(done)
    tree = Tree(place, int(done.stdout))

    def goes_on() -> None:
        wait_until((place / "own/named").exists)
        count = (place / "own/named").read_text()
        wait_until(lambda: (place / "own/named").read_text() != count)

    try:
        goes_on()
        assert (place / "own").stat().st_uid == 300_032
        for _ in range(2):
            restore(users, ALICE, tree, dump(users, ALICE, tree))
            shutil.rmtree(place / "image")
            goes_on()
    finally:
        tree.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("program", ["credentials", "anonymous", "threads"])
def test_a_tree_of_another_user_lies_in_the_own_ranges(
    users: Users, begin: Callable[..., Tree], program: str
) -> None:
    tree = begin(ALICE, "auto", program)
    image = dump(users, ALICE, tree)
    same = users.engine(BOB, "restore", "--from", image, "--detach")
    assert same.returncode == 3, said(same)
    for words in (
        "user namespace 1: line `1 300000 65536` of its uid_map has no place here",
        "the nearest ids here are 500000-500999",
        "--map auto",
    ):
        assert words in same.stderr, said(same)
    restore(users, BOB, tree, image, "--map", "auto")
    assert maps_of(tree.pid) == [
        ["0", "61302", "1", "1", "510000", "65536"],
        ["0", "62302", "1", "1", "600000", "65536"],
    ]
    tree.check()


def test_a_user_without_ranges_is_told_what_to_ask_for(users: Users, begin: Callable[..., Tree]) -> None:
    tree = begin(ALICE, "auto", "threads")
    image = dump(users, ALICE, tree)
    done = users.engine(CAROL, "restore", "--from", image, "--map", "auto")
    assert done.returncode == 1, said(done)
    assert "the tree needs 65537 uids, and 1 are given" in done.stderr
    assert "usermod --add-subuids" in done.stderr
    assert "carol" in done.stderr


@contextmanager
def serving(
    users: Users, owner: User, secret: Path, *options: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`serve` as a user, and where it listens."""
    listen = ["serve", "--listen", "127.0.0.1:0", "--once", "--secret-file", str(secret)]
    server = subprocess.Popen(
        users.engine_command(owner, *listen, *options),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("listening on "), f"{line} {server.communicate(timeout=10)}"
        yield server, line.split()[-1]
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
        server.communicate(timeout=20)


@pytest.mark.parametrize(
    ("source", "destination", "lines"),
    [
        (
            ALICE,
            BOB,
            [["0", "61302", "1", "1", "510000", "65536"], ["0", "62302", "1", "1", "600000", "65536"]],
        ),
        (CAROL, DAVE, [["0", "61304", "1"], ["0", "62304", "1"]]),
    ],
    ids=["with ranges", "of one id"],
)
def test_a_tree_moves_from_one_plain_user_to_another(
    users: Users, begin: Callable[..., Tree], source: User, destination: User, lines: list[list[str]]
) -> None:
    tree = begin(source, "auto" if source.uids else "", "threads")
    secrets = {}
    for owner in (source, destination):
        secrets[owner.name] = write_secret(tree.directory / owner.name)
        os.chown(secrets[owner.name], owner.uid, owner.gid)
    for start, end in ((source, destination), (destination, source)):  # there, and back
        family = tree.pids()
        with serving(users, end, secrets[end.name], "--map", "auto") as (server, to):
            moved = users.engine(
                start, "migrate", "--pid", str(tree.pid), "--to", to, "--secret-file", secrets[start.name]
            )
            assert moved.returncode == 0, said(moved)
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("restored: root pid "), line
            assert server.wait(20) == 0
        assert not reap(family), "the source still runs"
        tree.pid = int(line.split()[-1])
        if end is destination:
            assert maps_of(tree.pid) == lines
        tree.check()
