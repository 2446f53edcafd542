"""Content of files that goes along: made where it is lacking, compared where not, taken away when the restore fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.codec import Image
from pipeline.image.schema import Content, FileIdentity, FileOwner, Id, PathRef, TakenFile
from pipeline.kernel.syscalls import RESOLVE, openat2
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.resources import sparse
from pipeline.resources.taken import Making, _as_owner
from tests.harness.hosts import serving, terminate, two_hosts
from tests.harness.tree import engine, family_of, reap, said
from tests.resources.fdharness import subject

pytestmark = pytest.mark.root

BYTES = b"what the destination lacks " * 1000
HOLE_BYTES = 3 << 20
#: opens the file and waits
PROGRAM = "exec 7<$0; exec ${1:-sleep} 1000"


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every uid may search."""
    path = Path(f"/tmp/with-files-{os.getpid()}-{time.monotonic_ns()}")
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", path], check=True)


@pytest.fixture
def data(place: Path) -> Path:
    """The file: data, a hole, data; with an owner, a mode, an attribute; two directories down."""
    folder = place / "deep" / "down"
    folder.mkdir(parents=True)
    folder.chmod(0o751)
    os.chown(folder, 56, 78)
    path = folder / "data"
    with path.open("wb") as file:
        file.write(BYTES)
        file.seek(HOLE_BYTES)
        file.write(b"end")
    os.chown(path, 12, 34)
    path.chmod(0o2644)
    os.setxattr(path, "user.note", b"a note")
    os.utime(path, ns=(1, 1_234_567_890_123_456_789))
    return path


def start(data: Path, *options: str, program: str = PROGRAM) -> int:
    done = engine("run", *options, "--detach", "--", "sh", "-c", program, data)
    assert done.returncode == 0, said(done)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while not os.path.exists(f"/proc/{pid}/fd/7"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return pid


def dump(pid: int, image: Path, *options: str) -> None:
    family = family_of(pid)
    done = engine("dump", "--pid", pid, "--to", image, *options)
    assert done.returncode == 0, said(done)
    if "--leave-running" not in options:
        assert not reap(family)


def end(pid: int) -> None:
    family = family_of(pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for member in family[1:]:
        with suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    assert not reap(family)


def lose(data: Path) -> None:
    data.unlink()
    data.parent.rmdir()
    data.parent.parent.rmdir()


def test_a_lacking_file_is_made_with_all_it_had(data: Path, tmp_path: Path) -> None:
    pid = start(data)
    before = data.stat()
    dump(pid, tmp_path / "image", "--with-files", "*/down/d?ta")
    lose(data)
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    assert f"{data} was made: it came along" in done.stderr
    try:
        after = data.stat()
        for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_mtime_ns"):
            assert getattr(after, field) == getattr(before, field), field
        assert after.st_blocks * 512 < HOLE_BYTES
        assert data.read_bytes()[: len(BYTES)] == BYTES
        assert os.getxattr(data, "user.note") == b"a note"
        assert os.path.samestat(os.stat(f"/proc/{pid}/fd/7"), after)
        assert stat.S_IMODE(data.parent.stat().st_mode) == 0o751
        assert (data.parent.stat().st_uid, data.parent.stat().st_gid) == (56, 78)
        assert os.listdir(data.parent) == ["data"]
    finally:
        end(pid)


def test_a_directory_that_is_made_with_a_file_may_be_where_a_process_works(
    data: Path, tmp_path: Path
) -> None:
    pid = start(data, program="cd ${0%/*}; " + PROGRAM)
    dump(pid, tmp_path / "image", "--with-files", str(data))
    lose(data)
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    try:
        assert os.path.samefile(f"/proc/{pid}/cwd", data.parent)
    finally:
        end(pid)


def test_inspect_shows_what_came_along(data: Path, tmp_path: Path) -> None:
    pid = start(data)
    dump(pid, tmp_path / "image", "--with-files", str(data))
    shown = engine("inspect", tmp_path / "image")
    assert "Files that came along" in shown.stdout
    assert "3.1 MB" in shown.stdout
    (taken,) = json.loads(engine("inspect", tmp_path / "image", "--json").stdout)["taken-files"]
    assert taken["path"]["path"] == str(data)


def test_a_file_that_is_there_has_to_be_the_same(data: Path, tmp_path: Path) -> None:
    pid = start(data)
    dump(pid, tmp_path / "image", "--with-files", str(data))
    data.write_bytes(b"another")
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 3, said(done)
    assert f"file {data}: is there, and not the one that came along: it has 7 bytes" in done.stderr
    assert data.read_bytes() == b"another"
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--files", "any")
    assert done.returncode == 0, said(done)
    end(pid)


def test_whoever_restores_may_accept_another_file_and_is_told(data: Path, tmp_path: Path) -> None:
    pid = start(data)
    dump(pid, tmp_path / "image")
    data.write_bytes(b"another")
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 3, said(done)
    assert f"open file {data}: is not what it was: it has 7 bytes, and had {HOLE_BYTES + 3}" in done.stderr
    assert "nothing was touched" in done.stderr
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--files", "any")
    assert done.returncode == 0, said(done)
    assert "it has 7 bytes, and had 3145731; it is used all the same" in done.stderr
    end(pid)


def test_without_it_what_is_lacking_is_named_before_anything_is_made(data: Path, tmp_path: Path) -> None:
    pid = start(data)
    dump(pid, tmp_path / "image")
    data.unlink()
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 3, said(done)
    assert f"open file {data}: is not here" in done.stderr
    assert "--with-files" in done.stderr
    assert "nothing was touched" in done.stderr


def test_a_restore_that_fails_takes_it_away_again(data: Path, tmp_path: Path) -> None:
    pid = start(data)
    try:
        dump(pid, tmp_path / "image", "--with-files", str(data), "--leave-running")
        lose(data)
        done = engine("restore", "--from", tmp_path / "image", "--detach")
        assert done.returncode not in (0, 3), said(done)
        assert "in use" in done.stderr
        assert not data.parent.parent.exists()
    finally:
        end(pid)


def test_a_file_of_nobody_in_the_tree_is_made_only_if_named(data: Path, tmp_path: Path) -> None:
    """The tree runs as other ids than the file's owner: an image alone does not get to write there."""
    pid = start(data, "--userns=0:300000:65536")
    dump(pid, tmp_path / "image", "--with-files", str(data))
    lose(data)
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 3, said(done)
    assert (
        f"file {data}: is lacking here, and belongs to 12:34, as whom no process of the tree runs"
        in done.stderr
    )
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--with-files", str(data))
    assert done.returncode == 0, said(done)
    try:
        assert (data.stat().st_uid, data.stat().st_gid) == (12, 34)
    finally:
        end(pid)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_file_of_the_tree_is_made_with_its_own_rights(data: Path, tmp_path: Path, depth: int) -> None:
    """Its owner may write where the tree could; where not, it is refused."""
    for path in (data, data.parent, data.parent.parent):
        os.chown(path, 300_000, 300_000)
    os.chown(data.parent.parent.parent, 300_000, 300_000)
    program = [] if depth == 1 else ["unshare", "-U", "-r"]
    done = engine("run", "--userns=0:300000:65536", "--detach", "--", *program, "sh", "-c", PROGRAM, data)
    assert done.returncode == 0, said(done)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while not os.path.exists(f"/proc/{pid}/fd/7"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    dump(pid, tmp_path / "image", "--with-files", str(data))
    lose(data)
    os.chown(data.parent.parent.parent, 0, 0)
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode not in (0, 3), said(done)
    assert f"file {data} cannot be made here: Permission denied" in done.stderr
    os.chown(data.parent.parent.parent, 300_000, 300_000)
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    try:
        assert data.stat().st_uid == data.parent.stat().st_uid == 300_000
        assert os.path.samestat(os.stat(f"/proc/{pid}/fd/7"), data.stat())
    finally:
        end(pid)


def test_a_tree_moves_to_a_host_that_lacks_its_program_and_its_files(data: Path, secret: Path) -> None:
    """The destination has another mount namespace, where the directory is empty."""
    program = data.parent / "program"
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    with two_hosts() as (source, destination):
        assert destination.run("mount", "-t", "tmpfs", "empty", data.parents[2]).returncode == 0
        assert source.run("sh", "-c", "echo 4000 > /proc/sys/kernel/ns_last_pid").returncode == 0
        done = source.engine("run", "--detach", "--", "sh", "-c", PROGRAM, data, program)
        assert done.returncode == 0, said(done)
        root = done.stdout.strip()
        source.run("sh", "-c", f"while ! [ -e /proc/{root}/fd/7 ]; do sleep 0.01; done")
        with serving(destination, secret, "--once") as server:
            move = ["migrate", "--pid", root, "--to", server.address, "--secret-file", secret]
            refused = source.engine(*move)
            assert refused.returncode != 0, said(refused)
            assert f"mapped file {program}: is not here" in refused.stderr
            assert source.run("test", "-e", f"/proc/{root}/fd/7").returncode == 0, "the tree is gone"
            done = source.engine(*move, "--with-files", f"{data.parent}/*")
            assert done.returncode == 0, said(done) + str(terminate(server.process))
            server.has_served()
        told = destination.run(
            "sh", "-c", f"cd {data.parent} && readlink /proc/{root}/exe && ls && tail -c 3 data"
        )
        assert told.stdout == f"{program}\ndata\nprogram\nend", said(told)


# -- hostile images -----------------------------------------------------------------------


def hostile(path: bytes, owner: int = 0) -> Image:
    image = Image()
    image.contents[1] = Content(space=1, size_bytes=4)
    image.taken_files[0] = TakenFile(
        index=0,
        path=PathRef(0, path),
        identity=FileIdentity(4, 5, 0o100644),
        owner=FileOwner(0o644, Id(0, owner), Id(0, owner)),
        content=1,
    )
    return image


@contextmanager
def making(image: Image, root: Path, named: str = "*") -> Iterator[Making]:
    source = os.memfd_create("content")
    os.write(source, b"evil")

    def open_path(path: PathRef, flags: int) -> LocalFd:
        fd = os.open(root, os.O_PATH | os.O_DIRECTORY)
        try:
            return openat2(LocalFd(fd), path.path, flags, 0, RESOLVE.IN_ROOT)
        finally:
            os.close(fd)

    policy = RestorePolicy(with_files=(named,))
    made = Making(image, open_path, lambda _: LocalFd(source), lambda one: one.id, lambda one: one.id, policy)
    try:
        yield made
    finally:
        made.close()
        made.close()
        os.close(source)


@pytest.fixture(params=[True, False], ids=["nameless", "named"])
def knows_nameless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the filesystem has files without a name (O_TMPFILE)."""
    usual = os.open

    def without(path: bytes, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no files without a name")
        return usual(path, flags, *rest, **more)

    if not request.param:
        monkeypatch.setattr(os, "open", without)
    return bool(request.param)


def test_a_file_that_is_not_complete_has_no_name_where_that_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, knows_nameless: bool
) -> None:
    """So a SIGKILL leaves nothing behind; and an error leaves nothing in any case."""
    image = hostile(b"/new/file")
    seen: list[list[str]] = []
    copy = sparse.copy

    def look(source: LocalFd, target: int, size_bytes: int) -> None:
        seen.append(os.listdir(tmp_path / "new"))
        copy(source, target, size_bytes)

    monkeypatch.setattr(sparse, "copy", look)
    with making(image, tmp_path) as made:
        made.make(list(image.taken_files.values()))
        assert os.listdir(tmp_path / "new") == ["file"]
        assert (tmp_path / "new" / "file").read_bytes() == b"evil"
    assert [len(names) for names in seen] == ([0] if knows_nameless else [1])
    assert not os.listdir(tmp_path)

    def cut(source: LocalFd, target: int, size_bytes: int) -> None:
        raise OSError(errno.EDQUOT, "no room")

    monkeypatch.setattr(sparse, "copy", cut)
    with making(image, tmp_path) as made, pytest.raises(RebuildError, match="no room"):
        made.make(list(image.taken_files.values()))
    assert not os.listdir(tmp_path)


@pytest.mark.usefixtures("knows_nameless")
def test_a_name_that_comes_to_be_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = hostile(b"/file")

    def other(source: LocalFd, target: int, size_bytes: int) -> None:
        (tmp_path / "file").write_bytes(b"somebody's")

    monkeypatch.setattr(sparse, "copy", other)
    with making(image, tmp_path) as made, pytest.raises(RebuildError, match="exists"):
        made.make(list(image.taken_files.values()))
    assert (tmp_path / "file").read_bytes() == b"somebody's"
    assert os.listdir(tmp_path) == ["file"]


def test_a_size_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    image = hostile(b"/file")
    image.taken_files[0] = replace(image.taken_files[0], identity=FileIdentity(1 << 63, 5, 0o100644))
    with making(image, tmp_path) as made, pytest.raises(RebuildError, match="cannot be made"):
        made.make(list(image.taken_files.values()))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "path", [b"/../../../out", b"/link/out", b"/a/../../out", b"/link/../out", b"/abs/out"]
)
def test_no_name_leads_out_of_the_root(tmp_path: Path, path: bytes) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to("../..")
    (root / "abs").symlink_to(tmp_path)
    image = hostile(path)
    with making(image, root) as made, suppress(RebuildError):
        made.make(list(image.taken_files.values()))
        made.keep()
    assert not list(tmp_path.glob("out"))
    assert not Path("/out").exists()


@pytest.mark.parametrize("path", [b"", b"/", b"/..", b"/.", b"/file/below", b"/" + b"x" * 300, b"/a\0b"])
def test_names_that_are_none_are_errors_and_leave_nothing(tmp_path: Path, path: bytes) -> None:
    (tmp_path / "file").touch()
    image = hostile(path)
    with making(image, tmp_path) as made:
        if not list(made.check(list(image.taken_files.values()))):
            with pytest.raises(RebuildError):
                made.make(list(image.taken_files.values()))
    assert os.listdir(tmp_path) == ["file"]
    assert not [held for held in LEDGER.held() if held[0] == "file that came along"]


@pytest.mark.parametrize(
    ("uid", "gid", "is_made"), [(1000, 1000, True), (1000, 2000, True), (1001, 1000, False)]
)
def test_who_may_not_become_the_owner_makes_nothing_in_his_place(uid: int, gid: int, is_made: bool) -> None:
    """A plain user: what is not his is not made with his rights."""

    def setup() -> list[int]:
        os.setgroups([2000])
        os.setgid(1000)
        os.setuid(1000)
        ran: list[int] = []
        with nullcontext() if is_made else pytest.raises(PermissionError):
            _as_owner(uid, gid)(lambda: ran.append(os.geteuid()))
        return ran

    with subject(setup) as child:
        assert child.result == ([1000] if is_made else [])


def test_who_may_not_write_there_does_not(tmp_path: Path) -> None:
    image = hostile(b"/new", owner=0)
    with making(image, tmp_path, named="/nothing") as made:
        assert "as whom no process of the tree runs" in str(
            next(made.check(list(image.taken_files.values())))
        )
        with pytest.raises(RebuildError, match="belongs to nobody of the tree"):
            made.make(list(image.taken_files.values()))
    assert not os.listdir(tmp_path)
