"""What cannot work is refused with a clear message and the right exit code; the source runs on, nothing is left."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline.errors import Refused
from pipeline.image.codec import unpack
from pipeline.image.frames import HEAD, Kind, decode_head, encode
from pipeline.kernel import nsfs
from pipeline.transport import protocol
from tests.harness.carry import unharmed
from tests.harness.settings import CONTAINER_2, DEPTH_1, Setting
from tests.harness.tree import ROOT, Tree, dump, engine, family_of, has_kernel_threads, reap, restore, said

pytestmark = pytest.mark.root

Start = Callable[..., Tree]


def assert_nothing_written(image: Path) -> None:
    assert not image.exists() or not any(image.iterdir()), f"left behind: {list(image.rglob('*'))}"


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, said(done)
    assert "Traceback" not in done.stderr, said(done)
    for word in words:
        assert word in done.stderr, f"{word!r} is missing: {said(done)}"


# --- pids that cannot be dumped ---


def test_dump_pid_that_does_not_exist(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    done = engine("dump", "--pid", gone.pid, "--to", tmp_path / "image")
    assert_refused(done, 3, f"pid {gone.pid}")
    assert_nothing_written(tmp_path / "image")


@pytest.mark.skipif(not has_kernel_threads(), reason="no kernel thread in this pid namespace")
def test_dump_kernel_thread(tmp_path: Path) -> None:
    done = engine("dump", "--pid", 2, "--to", tmp_path / "image")
    assert_refused(done, 3, "pid 2", "kernel thread")
    assert_nothing_written(tmp_path / "image")


def _from_shell(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


def test_dump_ourselves(tmp_path: Path) -> None:
    done = _from_shell(f"exec {sys.executable} -m pipeline dump --pid $$ --to {tmp_path}/image")
    assert_refused(done, 3, "pid")
    assert_nothing_written(tmp_path / "image")


def test_dump_our_parent(tmp_path: Path) -> None:
    done = _from_shell(f"{sys.executable} -m pipeline dump --pid $$ --to {tmp_path}/image; exit $?")
    assert_refused(done, 3, "pid")
    assert_nothing_written(tmp_path / "image")


def test_dump_an_ancestor(tmp_path: Path) -> None:
    done = engine("dump", "--pid", os.getpid(), "--to", tmp_path / "image")
    assert_refused(done, 3, f"pid {os.getpid()}")
    assert_nothing_written(tmp_path / "image")


def test_dump_one_that_is_traced(start: Start, tmp_path: Path) -> None:
    tree = start("quiet")
    ready, told = os.pipe()
    tracer = os.fork()
    if tracer == 0:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.ptrace(ctypes.c_long(0x4206), ctypes.c_long(tree.pid), None, None) == 0:
                os.write(told, b"x")
                signal.pause()
        finally:
            os._exit(1)
    os.close(told)
    try:
        assert os.read(ready, 1) == b"x"
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image")
        assert_refused(done, 3, f"pid {tree.pid}", "traced", str(tracer))
    finally:
        os.close(ready)
        os.kill(tracer, signal.SIGKILL)
        os.waitpid(tracer, 0)
    assert_nothing_written(tmp_path / "image")
    with unharmed(tree):
        pass


def test_all_of_a_tree_that_forks_while_it_is_frozen(start: Start, tmp_path: Path) -> None:
    others = set(family_of(os.getpid()))
    tree = start("forking", DEPTH_1)
    for number in range(4):
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / f"running{number}", "--leave-running")
        assert done.returncode == 0, said(done)
        tree.check()
    for number in range(3):
        image = tmp_path / f"image{number}"
        done = engine("dump", "--pid", tree.pid, "--to", image)
        assert done.returncode == 0, said(done)
        # Whoever lost its parent has come to us.
        left = reap([pid for pid in family_of(os.getpid()) if pid not in others])
        assert not left, f"left running: {left}"
        restore(tree, image)
        tree.check()


# --- images ---


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def dumped(start: Start, tmp_path: Path) -> tuple[Tree, Path]:
    """A tree that is gone, and its image, which is all of one piece."""
    tree = start("quiet", DEPTH_1)
    dump(tree, tmp_path / "image", "--mode", "stop")
    return tree, tmp_path / "image"


def assert_not_restored(tree: Tree, image: Path, *words: str, code: int = 1) -> None:
    done = engine("restore", "--from", image, "--detach")
    assert_refused(done, code, *words)
    assert not os.path.exists(f"/proc/{tree.pid}"), "something was restored"


def _rewrite_head(image: Path, **changes: object) -> None:
    """Replace fields of the first record, with right checksums: what another program could have written."""
    import msgpack

    path = image / "image"
    content = path.read_bytes()
    head = decode_head(content[: HEAD.size], "the first frame")
    assert (head.kind, head.payload_bytes) == (Kind.RECORD, 0)
    record = unpack(content[HEAD.size : HEAD.size + head.header_bytes])
    assert record["type"] == "head"
    record.update(changes)
    frame = encode(Kind.RECORD, msgpack.packb(record))
    changed = frame + content[HEAD.size + head.header_bytes :]
    path.write_bytes(changed)
    manifest = image / "manifest"
    manifest.write_text(manifest.read_text().replace(str(len(content)), str(len(changed))))


def test_image_of_another_processor(dumped: tuple[Tree, Path]) -> None:
    _tree, image = dumped
    _rewrite_head(image, machine="aarch64")
    done = engine("restore", "--from", image, "--detach")
    assert done.returncode in {1, 3}, said(done)
    assert_refused(done, done.returncode, "aarch64")


def test_image_of_a_newer_format(dumped: tuple[Tree, Path]) -> None:
    _tree, image = dumped
    _rewrite_head(image, version=99)
    done = engine("restore", "--from", image, "--detach")
    assert done.returncode in {1, 3}, said(done)
    assert_refused(done, done.returncode, "99")


def test_image_of_a_newer_manifest(dumped: tuple[Tree, Path]) -> None:
    _tree, image = dumped
    manifest = image / "manifest"
    manifest.write_text(manifest.read_text().replace('"format":1', '"format":99'))
    done = engine("restore", "--from", image, "--detach")
    assert done.returncode in {1, 3}, said(done)
    assert_refused(done, done.returncode, "99")


def test_image_that_is_truncated(dumped: tuple[Tree, Path]) -> None:
    tree, image = dumped
    whole = (image / "image").read_bytes()
    for part in (0.0, 0.001, 0.01, 0.5, 0.999):
        (image / "image").write_bytes(whole[: int(len(whole) * part)])
        assert_not_restored(tree, image, "image")
    (image / "image").write_bytes(whole[:-1])
    assert_not_restored(tree, image, "image")
    (image / "image").unlink()
    assert_not_restored(tree, image, "image")


def test_image_without_its_manifest(dumped: tuple[Tree, Path]) -> None:
    tree, image = dumped
    (image / "manifest").unlink()
    assert_not_restored(tree, image, "manifest")


def test_image_with_a_flipped_bit(dumped: tuple[Tree, Path]) -> None:
    tree, image = dumped
    whole = (image / "image").read_bytes()
    for place in (0, 5, 9, 40, 300, 6000, len(whole) // 3, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (image / "image").write_bytes(damaged)
        assert_not_restored(tree, image)
    (image / "image").write_bytes(whole)
    restore(tree, image)
    tree.check()


@pytest.mark.parametrize("name", ["open", "mapped"])
def test_file_that_is_missing(dumped: tuple[Tree, Path], name: str) -> None:
    tree, image = dumped
    path = tree.directory / name
    path.rename(path.with_suffix(".away"))
    done = engine("restore", "--from", image, "--detach")
    assert done.returncode in {1, 3}, said(done)
    assert_refused(done, done.returncode, str(path))
    path.with_suffix(".away").rename(path)
    restore(tree, image)
    tree.check()


@pytest.mark.parametrize("name", ["open", "mapped"])
@pytest.mark.parametrize("change", ["size", "mtime"])
def test_file_that_has_changed(dumped: tuple[Tree, Path], name: str, change: str) -> None:
    tree, image = dumped
    path = tree.directory / name
    times = path.stat()
    if change == "size":
        with path.open("ab") as file:
            file.write(b"more")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1_000_000))
    done = engine("restore", "--from", image, "--detach")
    assert done.returncode in {1, 3}, said(done)
    assert_refused(done, done.returncode, str(path))
    assert not os.path.exists(f"/proc/{tree.pid}")


def test_executable_that_has_changed(start: Start, tmp_path: Path, workshop) -> None:
    tree = start("stack")
    dump(tree, tmp_path / "image")
    binary = Path(workshop.command("stack")[0])
    kept = tmp_path / "kept"
    shutil.copy2(binary, kept)
    try:
        source = workshop.programs / "stack.c"
        again = ["cc", "-O0", "-g", "-pthread", "-DOTHER", "-o", str(binary), str(source)]
        binary.unlink()
        subprocess.run(again, check=True, capture_output=True)
        done = engine("restore", "--from", tmp_path / "image", "--detach")
        assert done.returncode in {1, 3}, said(done)
        assert_refused(done, done.returncode, str(binary))
    finally:
        binary.unlink()
        shutil.copy2(kept, binary)


def test_pid_that_is_in_use(dumped: tuple[Tree, Path]) -> None:
    tree, image = dumped
    restore(tree, image)
    with unharmed(tree):
        done = engine("restore", "--from", image, "--detach")
        assert done.returncode in {1, 3}, said(done)
        assert_refused(done, done.returncode, f"{tree.pid}")


@contextmanager
def occupied(pid: int) -> Iterator[None]:
    """A process of ours has `pid` (clone3 with set_tid)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    wanted = (ctypes.c_int * 1)(pid)
    # struct clone_args: exit_signal at 32, set_tid at 64, set_tid_size at 72
    arguments = struct.pack("<11Q", 0, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, ctypes.addressof(wanted), 1, 0)
    result = libc.syscall(ctypes.c_long(435), arguments, ctypes.c_long(len(arguments)))
    if result == 0:
        libc.pause()
        os._exit(1)
    assert result == pid, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("setting", [DEPTH_1, CONTAINER_2], ids=lambda s: s.name)
@pytest.mark.parametrize("program", ["threads", "processes"])
def test_pid_deep_in_the_tree_that_is_in_use(
    start: Start, tmp_path: Path, program: str, setting: Setting
) -> None:
    """The rebuild has come far when it meets the pid: all of it must go again."""
    tree = start(program, setting)
    tasks = sorted({int(task) for pid in tree.pids() for task in os.listdir(f"/proc/{pid}/task")})
    dump(tree, tmp_path / "image")
    for pid in (tasks[1], tasks[-1]):
        with occupied(pid):
            done = engine("restore", "--from", tmp_path / "image", "--detach", timeout_s=20)
            assert_refused(done, 1, str(pid), "in use")
        left = reap(tasks, 2.0)
        assert not left, f"something was left: {left}"
    restore(tree, tmp_path / "image")
    tree.check()


# --- destinations ---


def test_image_directory_that_is_not_empty(start: Start, tmp_path: Path) -> None:
    tree = start("quiet")
    (tmp_path / "something").write_text("of the user's")
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path)
        assert done.returncode in {1, 2, 3}, said(done)
        assert_refused(done, done.returncode, str(tmp_path))
    assert (tmp_path / "something").read_text() == "of the user's"
    assert os.listdir(tmp_path) == ["something"]


def test_image_below_a_file(start: Start, tmp_path: Path) -> None:
    tree = start("quiet")
    (tmp_path / "file").write_text("no directory")
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "file" / "image")
        assert done.returncode in {1, 2, 3}, said(done)
        assert_refused(done, done.returncode, str(tmp_path))


@pytest.mark.parametrize("mode", ["stop", "precopy"])
def test_disk_that_is_full(start: Start, tmp_path: Path, mode: str) -> None:
    tree = start("quiet")
    (tmp_path / "small").mkdir()
    # A disk of 1 MiB in a mount namespace that ends with the command.
    script = (
        f"mount -t tmpfs -o size=1m none {tmp_path}/small && "
        f"{sys.executable} -m pipeline dump --pid {tree.pid} --to {tmp_path}/small/image --mode {mode}; code=$?; "
        f"find {tmp_path}/small -type f; exit $code"
    )
    with unharmed(tree):
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        assert_refused(done, 1, "space", "small")
    assert not done.stdout, f"left behind: {done.stdout}"


def migrate(tree: Tree, port: int, secret: Path) -> subprocess.CompletedProcess[str]:
    return engine("migrate", "--pid", tree.pid, "--to", f"127.0.0.1:{port}", "--secret-file", secret)


def test_migrate_to_where_nobody_listens(start: Start, secret: Path) -> None:
    tree = start("quiet")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with unharmed(tree):
            assert_refused(migrate(tree, held.getsockname()[1], secret), 1, "127.0.0.1")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", bytes(range(256)) * 64])
def test_migrate_to_a_stranger(start: Start, secret: Path, answer: bytes) -> None:
    tree = start("quiet")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4)

        def serve() -> None:
            try:
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.settimeout(5)
                        peer.recv(100)
                        peer.sendall(answer)
            except OSError:
                return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with unharmed(tree):
                done = migrate(tree, listener.getsockname()[1], secret)
                assert_refused(done, 1)
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def served(secret: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A running `serve` and its port; ended at the end."""
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--secret-file",
        str(secret),
    ]
    process = subprocess.Popen(
        [*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), f"{line} {process.communicate()}"
        yield process, int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.communicate()


def test_migrate_with_the_wrong_secret(start: Start, secret: Path, tmp_path: Path) -> None:
    tree = start("quiet")
    other = tmp_path / "other"
    other.write_text("another secret, as long as the first one\n")
    other.chmod(0o600)
    with served(secret) as (process, port):
        with unharmed(tree):
            assert_refused(migrate(tree, port, other), 1)
        assert process.poll() is None, "a stranger must not end the server"


_OLDER = """
import sys
from pipeline.cli.main import main
from pipeline.transport import protocol
protocol.VERSION -= 1
sys.exit(main(sys.argv[1:]))
"""


def test_migrate_from_another_version(start: Start, secret: Path) -> None:
    tree = start("quiet")
    with served(secret) as (server, port), unharmed(tree):
        command = [
            "migrate",
            "--pid",
            str(tree.pid),
            "--to",
            f"127.0.0.1:{port}",
            "--secret-file",
            str(secret),
        ]
        done = subprocess.run(
            [sys.executable, "-c", _OLDER, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert_refused(
            done, 1, f"version {protocol.VERSION} of the protocol", "the same version of the pipeline"
        )
        server.terminate()
        _, err = server.communicate()
        assert f"speaks version {protocol.VERSION - 1} of the protocol" in err


def test_migrate_to_a_destination_that_is_killed(start: Start, secret: Path) -> None:
    tree = start("quiet")
    with served(secret) as (process, port), unharmed(tree):
        done: list[subprocess.CompletedProcess[str]] = []
        thread = threading.Thread(target=lambda: done.append(migrate(tree, port, secret)))
        # The kernel takes the connection of a stopped server, which says nothing: the migration waits, then it is gone.
        process.send_signal(signal.SIGSTOP)
        thread.start()
        time.sleep(1)
        process.kill()
        thread.join(60)
        assert done
        assert_refused(done[0], 1)


def test_migrate_to_a_destination_without_the_files(start: Start, secret: Path) -> None:
    """The destination has other files (here: they are made to differ while the tree runs): it must refuse."""
    tree = start("quiet")
    with served(secret) as (_, port), unharmed(tree):
        assert tree.directory.exists()
        path = tree.directory / "mapped"
        path.rename(path.with_suffix(".away"))
        (tree.directory / "mapped").write_bytes(b"another file")
        try:
            done = migrate(tree, port, secret)
            assert done.returncode in {1, 3}, said(done)
        finally:
            path.with_suffix(".away").rename(path)


def test_a_process_of_a_namespace_that_is_not_below_ours_is_refused_whatever_it_maps(
    start: Callable[..., Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = start("sysv", DEPTH_1)

    def parent(_: int) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(nsfs, "parent", parent)
    with pytest.raises(Refused, match="user namespace"):
        trio.run(pipeline.dump, tree.pid, str(tmp_path / "image"))
    tree.check()
