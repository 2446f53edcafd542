"""Storages: one suite for a directory, ``file://`` and a real S3 server on loopback."""

from __future__ import annotations

import errno
import os
import threading
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from pipeline.errors import ImageError, StorageError, UsageError
from pipeline.ids import LocalFd
from pipeline.kernel import syscalls
from pipeline.kernel.statfs import Magic
from pipeline.ledger import LEDGER
from pipeline.transport import files, storage
from pipeline.transport.storage import CLAIM, IMAGE, MANIFEST, Storage, open_storage
from tests.harness import object_store, odd_store
from tests.harness.wire import Wire

MIB = 1 << 20


# begun before a test's own things are counted
pytestmark = pytest.mark.usefixtures("s3_server")


@pytest.fixture(params=["directory", "file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for one image, where none is."""
    match request.param:
        case "directory":
            return str(tmp_path / "image")
        case "file":
            return (tmp_path / "an image").as_uri()
    request.getfixturevalue("s3")
    return f"s3://images/{next(NUMBERS)}"


NUMBERS = count()


async def write(storage: Storage, name: str, data: bytes) -> None:
    """Write an object into a storage that is claimed."""
    async with storage.create(name) as sink:
        await sink.write(data)


async def fill(storage: Storage, data: bytes) -> None:
    async with storage.claimed():
        await write(storage, IMAGE, data)


async def begin_to_fill(storage: Storage, data: bytes) -> None:
    async with storage.claimed(), storage.create(IMAGE) as sink:
        await sink.write(data)
        raise ZeroDivisionError


async def content_of(storage: Storage, name: str, step: int = MIB) -> bytes:
    got, buffer = bytearray(), memoryview(bytearray(step))
    async with storage.open(name) as source:
        while size := await source.read_into(buffer):
            got += buffer[:size]
    return bytes(got)


async def test_what_is_written_small_and_large_stays_in_order(url: str) -> None:
    storage = open_storage(url)
    parts = [os.urandom(size) for size in (5, 100, MIB, 3, 60 << 10, 5 << 10, 0, 64 << 10, 1, MIB, 7)]
    async with storage.claimed(), storage.create(IMAGE) as sink:
        await sink.write(*parts[:2])
        for part in parts[2:]:
            await sink.write(part)
    assert await content_of(open_storage(url), IMAGE) == b"".join(parts)


@pytest.mark.parametrize("size", [0, 1, 20 * MIB + 5])
async def test_what_was_written_is_read(url: str, size: int):
    storage, data = open_storage(url), os.urandom(size)
    async with storage.claimed(), storage.create(IMAGE) as sink:
        for start in range(0, size, 3 * MIB):
            await sink.write(
                memoryview(data)[start : start + 3], memoryview(data)[start + 3 : start + 3 * MIB]
            )
    assert await content_of(open_storage(url), IMAGE, 1 << 18) == data


@pytest.mark.parametrize("size", [0, 20 * MIB])
async def test_an_error_while_writing_leaves_nothing_and_is_itself_seen(url: str, size: int):
    storage, held = open_storage(url), LEDGER.held()
    with pytest.raises(ZeroDivisionError):
        await begin_to_fill(storage, bytes(size))
    with pytest.raises(ImageError):
        await content_of(storage, IMAGE)
    await open_storage(url).require_free()
    assert LEDGER.held() == held


async def test_a_cancelled_write_leaves_nothing(url: str):
    storage = open_storage(url)
    with trio.CancelScope() as scope:
        async with storage.claimed(), storage.create(IMAGE) as sink:
            await sink.write(bytes(20 * MIB))
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(ImageError):
        await content_of(storage, IMAGE)


async def test_an_image_that_is_there_is_not_overwritten(url: str):
    storage = open_storage(url)
    await storage.require_free()
    async with storage.claimed():
        for name in (IMAGE, MANIFEST):
            await write(storage, name, b"{}")
    with pytest.raises(UsageError, match="holds an image already"):
        await open_storage(url).require_free()
    with pytest.raises(UsageError, match="holds an image already"):
        async with open_storage(url).claimed():
            pytest.fail("it is claimed")


async def test_two_cannot_write_one_image(url: str):
    """Whichever was asked first whether there is an image: of two trees one would be in none."""
    one, other = open_storage(url), open_storage(url)
    await one.require_free()
    await other.require_free()
    async with one.claimed():
        await write(one, IMAGE, b"one")
        with pytest.raises(UsageError, match="another dump is writing an image there"):
            async with other.claimed():
                pytest.fail("it is claimed twice")
        await write(one, MANIFEST, b"{}")
    assert await content_of(open_storage(url), IMAGE) == b"one"
    with pytest.raises(ImageError):
        await content_of(open_storage(url), CLAIM)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
async def test_a_disk_that_takes_no_claim_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    genuine = os.open

    def open_(path: str, flags: int, *rest: Any, **options: Any) -> int:
        if str(path).endswith(CLAIM):
            raise OSError(code, os.strerror(code))
        return genuine(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(StorageError, match=str(tmp_path)):
        await fill(open_storage(str(tmp_path / "image")), b"")
    assert os.listdir(tmp_path) == []
    assert not LEDGER.held()


async def test_a_store_without_conditions_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch):
    with odd_store.running("knows no conditions") as server:
        object_store.use(server.endpoint, monkeypatch)
        async with open_storage("s3://images/odd").claimed():
            assert list(server.objects) == ["/images/odd/writing"]
        assert not server.objects


async def test_a_place_is_claimed_once_where_an_answer_is_lost(monkeypatch: pytest.MonkeyPatch):
    """It is asked for again, and there is a claim by then: our own."""
    with odd_store.running("loses an answer") as server:
        object_store.use(server.endpoint, monkeypatch)
        async with open_storage("s3://images/odd").claimed():
            assert server.lost
            assert list(server.objects) == ["/images/odd/writing"]
        assert not server.objects


async def test_no_image(url: str):
    with pytest.raises(ImageError, match="there is no"):
        await content_of(open_storage(url), MANIFEST)


async def test_an_image_without_its_manifest_is_not_complete(url: str):
    storage = open_storage(url)
    await fill(storage, b"frames")
    with pytest.raises(ImageError, match="complete"):
        await content_of(storage, MANIFEST)


async def test_discard_is_idempotent(url: str):
    storage = open_storage(url)
    await fill(storage, b"frames")
    await storage.discard(IMAGE)
    await storage.discard(IMAGE)
    with pytest.raises(ImageError):
        await content_of(storage, IMAGE)


@pytest.mark.parametrize("text", ["s3://", "http://host/image", "file://elsewhere/image"])
def test_a_place_that_is_none_is_refused(text: str):
    with pytest.raises(UsageError):
        open_storage(text)


async def test_files_of_an_image_are_for_their_owner_only(tmp_path: Path):
    storage = open_storage(str(tmp_path / "deep" / "image"))
    async with storage.claimed(), storage.create(IMAGE) as sink:
        await sink.write(b"memory")
    assert (tmp_path / "deep" / "image" / IMAGE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "deep" / "image").stat().st_mode & 0o777 == 0o700


async def test_others_go_on_while_a_slow_disk_completes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun, gone_on = threading.Event(), threading.Event()
    seen: list[bool] = []

    def sync(directory: Path) -> None:
        begun.set()
        seen.append(gone_on.wait(5))

    async def go_on() -> None:
        while not begun.is_set():
            await trio.sleep(0.001)
        gone_on.set()

    monkeypatch.setattr(storage, "_sync_directory", sync)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(go_on)
        async with open_storage(str(tmp_path)).create(MANIFEST) as sink:
            await sink.write(b"complete")
    assert seen == [True, True]


async def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path):
    storage = open_storage(str(tmp_path / "image"))
    with pytest.raises(StorageError, match="no space"):
        await overfill(storage)
    assert os.listdir(tmp_path) == []


def taken_bytes(file: int | Path) -> int:
    """What a file takes of its file system."""
    return os.stat(file).st_blocks * 512


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Room is made in steps of 1 MiB; where each of them began, and how long it was."""
    monkeypatch.setattr(files, "_ROOM_STEP_BYTES", MIB)
    made: list[tuple[int, int]] = []

    def fallocate(fd: LocalFd, offset: int, length: int) -> None:
        made.append((offset, length))
        syscalls.fallocate(fd, offset, length)

    monkeypatch.setattr(files, "fallocate", fallocate)
    return made


async def test_room_is_made_before_something_is_written_and_what_is_too_much_given_back(
    tmp_path: Path, steps: list[tuple[int, int]]
):
    storage = open_storage(str(tmp_path / "image"))
    async with storage.claimed(), storage.create(IMAGE, 3 * MIB + 1) as sink:
        fd = sink.fd  # type: ignore[attr-defined]
        assert taken_bytes(fd) > 3 * MIB
        assert os.fstat(fd).st_size == 0
        await sink.write(b"memory")
    assert steps == [(0, MIB), (MIB, MIB), (2 * MIB, MIB), (3 * MIB, 1)]
    assert await content_of(storage, IMAGE) == b"memory"
    assert taken_bytes(tmp_path / "image" / IMAGE) < MIB


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EOPNOTSUPP])
async def test_a_disk_without_so_much_room_takes_what_it_can(
    tmp_path: Path, steps: list[tuple[int, int]], code: int, monkeypatch: pytest.MonkeyPatch
):
    """It is not known yet how much will be written; what was reserved does not stand in the way of others."""

    def fallocate(fd: LocalFd, offset: int, length: int) -> None:
        if offset:
            raise OSError(code, os.strerror(code))
        syscalls.fallocate(fd, offset, length)

    monkeypatch.setattr(files, "fallocate", fallocate)
    storage = open_storage(str(tmp_path / "image"))
    async with storage.claimed(), storage.create(IMAGE, 3 * MIB) as sink:
        assert taken_bytes(sink.fd) == 0  # type: ignore[attr-defined]
        await sink.write(b"memory")
    assert await content_of(storage, IMAGE) == b"memory"


async def test_room_is_not_taken_from_others(
    tmp_path: Path, steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    """The tree that is going to be stopped may write to that disk, too."""
    genuine = os.fstatvfs
    free = {"f_bavail": 6 * MIB, "f_frsize": 1}
    monkeypatch.setattr(os, "fstatvfs", lambda fd: genuine(fd) and SimpleNamespace(**free))
    for size, is_made in ((3 * MIB, True), (3 * MIB + 1, False)):
        steps.clear()
        storage = open_storage(str(tmp_path / str(size)))
        async with storage.claimed(), storage.create(IMAGE, size) as sink:
            await sink.write(b"memory")
        assert bool(steps) == is_made
        assert await content_of(storage, IMAGE) == b"memory"


async def test_cancelled_while_room_is_made_nothing_is_left(
    tmp_path: Path, steps: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    with trio.CancelScope() as scope:
        monkeypatch.setattr(
            files,
            "fallocate",
            lambda *step: steps.append(step[1:]) or trio.from_thread.run_sync(scope.cancel),
        )
        storage = open_storage(str(tmp_path / "image"))
        async with storage.claimed(), storage.create(IMAGE, 3 * MIB):
            pytest.fail("it is written to")
    assert scope.cancelled_caught
    assert steps == [(0, MIB)]
    assert os.listdir(tmp_path) == []


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Files are on a disk, which is given a MiB in one go; where each of them began, and how long it was."""
    monkeypatch.setattr(files, "_WRITEBACK_BYTES", MIB)
    monkeypatch.setattr(files, "filesystem", lambda _: Magic.EXT4)
    parts: list[tuple[int, int]] = []

    def begin_writeback(fd: LocalFd, offset: int, length: int) -> None:
        assert os.fstat(fd).st_size >= offset + length
        parts.append((offset, length))
        syscalls.begin_writeback(fd, offset, length)

    monkeypatch.setattr(files, "begin_writeback", begin_writeback)
    return parts


async def test_what_is_much_is_on_its_way_to_the_disk_while_more_is_written(
    tmp_path: Path, begun: list[tuple[int, int]]
):
    pieces = [bytes([number]) * (MIB // 2 + 1) for number in range(7)]
    storage = open_storage(str(tmp_path / "image"))
    async with storage.claimed(), storage.create(IMAGE) as sink:
        for done, piece in enumerate(pieces, 1):
            await sink.write(piece)
            with trio.fail_after(10):
                while len(begun) < done // 2:
                    await trio.sleep(0.001)
        assert begun == [(0, MIB), (MIB, MIB), (2 * MIB, MIB)]
    assert await content_of(storage, IMAGE) == b"".join(pieces)


async def test_a_disk_that_is_slow_is_in_nobodys_way(
    tmp_path: Path, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    """What is written meanwhile follows, one part behind the other; a file is closed when none is on its way."""
    free, at_once = threading.Event(), 0

    def begin_writeback(fd: LocalFd, offset: int, length: int) -> None:
        nonlocal at_once
        at_once += 1
        assert at_once == 1
        free.wait(10)
        os.fstat(fd)
        begun.append((offset, length))
        at_once -= 1

    monkeypatch.setattr(files, "begin_writeback", begin_writeback)
    storage = open_storage(str(tmp_path / "image"))
    async with storage.claimed(), storage.create(IMAGE) as sink:
        await sink.write(bytes(2 * MIB))
        await sink.write(bytes(2 * MIB))
        assert begun == []
        free.set()
    assert begun == [(0, MIB), (MIB, MIB), (2 * MIB, MIB), (3 * MIB, MIB)]
    assert await content_of(storage, IMAGE) == bytes(4 * MIB)


async def test_who_is_cancelled_waits_for_one_part(
    tmp_path: Path, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    with trio.CancelScope() as scope:

        def begin_writeback(fd: LocalFd, offset: int, length: int) -> None:
            trio.from_thread.run_sync(scope.cancel)
            os.fstat(fd)
            begun.append((offset, length))

        monkeypatch.setattr(files, "begin_writeback", begin_writeback)
        storage = open_storage(str(tmp_path / "image"))
        async with storage.claimed(), storage.create(IMAGE) as sink:
            await sink.write(bytes(4 * MIB))
            await trio.sleep(10)
    assert begun == [(0, MIB)]
    assert not (tmp_path / "image").exists()


async def test_a_disk_that_is_not_asked_early_is_asked_in_the_end(
    tmp_path: Path, begun: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
):
    """Where there is none, where it cannot, and where it fails, which fsync tells."""

    def fails(fd: LocalFd, offset: int, length: int) -> None:
        begun.append((offset, length))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for failing, magic, asked in ((True, Magic.EXT4, 1), (False, Magic.TMPFS, 0)):
        begun.clear()
        monkeypatch.setattr(files, "filesystem", lambda _, magic=magic: magic)
        if failing:
            monkeypatch.setattr(files, "begin_writeback", fails)
        storage = open_storage(str(tmp_path / str(asked)))
        async with storage.claimed(), storage.create(IMAGE) as sink:
            for _ in range(3):
                await sink.write(bytes(MIB))
        assert len(begun) == asked
        assert await content_of(storage, IMAGE) == bytes(3 * MIB)


async def overfill(storage: Storage) -> None:
    async with storage.claimed(), storage.create(IMAGE) as sink:
        full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(full, sink.fd, inheritable=False)  # type: ignore[attr-defined]
            await sink.write(b"memory")
        finally:
            os.close(full)


async def test_a_bucket_that_does_not_exist_is_a_storage_error(s3: str):
    with pytest.raises(StorageError):
        await fill(open_storage("s3://no-such-bucket/image"), bytes(20 * MIB))


async def put(url: str, data: bytes) -> None:
    """Write an object, or replace it."""
    storage = open_storage(url)
    await storage.discard(IMAGE)
    await fill(storage, data)


async def test_any_place_is_read_by_several_at_once(url: str):
    data = os.urandom(9 * MIB + 7)
    await put(url, data)
    views = {offset: bytearray(size) for offset, size in ((0, 1), (1, 4 * MIB), (8 * MIB, MIB + 7), (5, 0))}
    async with open_storage(url).open_ranges(IMAGE) as ranges, trio.open_nursery() as nursery:
        assert ranges.size_bytes == len(data)
        for offset, view in views.items():
            nursery.start_soon(ranges.read_at, offset, memoryview(view))
    assert all(data[offset : offset + len(view)] == view for offset, view in views.items())


async def test_behind_the_end_nothing_is_read(url: str):
    await put(url, bytes(100))
    async with open_storage(url).open_ranges(IMAGE) as ranges:
        with pytest.raises(ImageError, match="truncated"):
            await ranges.read_at(50, memoryview(bytearray(51)))


async def test_an_object_that_is_replaced_or_removed_is_never_taken_for_the_old_one(url: str):
    """A file that is open stays what it was; of an object in a store nothing more is read."""
    old = os.urandom(MIB)
    await put(url, old)
    async with open_storage(url).open_ranges(IMAGE) as ranges:
        for change in (lambda: put(url, os.urandom(MIB)), lambda: open_storage(url).discard(IMAGE)):
            await change()
            view = bytearray(1000)
            if url.startswith("s3:"):
                with pytest.raises(ImageError, match=r"was (replaced|removed) while it was read"):
                    await ranges.read_at(7, memoryview(view))
                assert view == bytes(1000)
            else:
                await ranges.read_at(7, memoryview(view))
                assert view == old[7:1007]


async def test_no_object_has_no_ranges(url: str):
    with pytest.raises(ImageError, match="there is no"):
        async with open_storage(url).open_ranges(IMAGE):
            pass


async def test_a_store_that_cannot_be_reached_is_said_soon_and_read_again_when_it_is_back(
    s3: str, monkeypatch: pytest.MonkeyPatch
):
    data = os.urandom(MIB)
    await put("s3://images/away", data)
    with Wire(s3.removeprefix("http://"), 1e9) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{wire.address}")
        async with open_storage("s3://images/away").open_ranges(IMAGE) as ranges:
            view = bytearray(MIB)
            wire.cut()
            with pytest.raises(StorageError, match="s3://images/away/image"):
                await ranges.read_at(0, memoryview(view))
            assert view == bytes(MIB)
            wire.mend()
            await ranges.read_at(0, memoryview(view))
    assert view == data


async def test_a_read_that_is_cancelled_leaves_its_buffer_alone(s3: str, monkeypatch: pytest.MonkeyPatch):
    await put("s3://images/slow", b"x" * MIB)
    with Wire(s3.removeprefix("http://"), 1e9) as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{wire.address}")
        async with open_storage("s3://images/slow").open_ranges(IMAGE) as ranges:
            wire.bytes_per_s = 1e5
            view = bytearray(MIB)
            with trio.move_on_after(0.3) as scope:
                await ranges.read_at(0, memoryview(view))
            assert scope.cancelled_caught
            wire.cut()  # ends what is on its way
    assert view == bytes(MIB)
