"""Containers that an OCI runtime has made: with a user namespace by root, and rootless by a plain user.

The runtime gives them what containers have: a root of their own, masked and read-only paths of /proc, devices,
/dev/shm, dropped capabilities, cgroups, and standard output that leads to a file outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import cgroupfs
from pipeline.resources.cgroups import settings
from tests.harness.tree import ROOT, Workshop, find_python, reap

BUSYBOX = Path(shutil.which("busybox") or "/nonexistent")
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("runc") is None, reason="runc is missing here"),
    pytest.mark.skipif(
        not BUSYBOX.exists() or b"/ld-linux" in BUSYBOX.read_bytes(),
        reason="no busybox here that needs no library",
    ),
]

UID, GID = 1234, 2345
COUNTS = """
echo kept > /dev/shm/file
i=0
while true; do i=$((i+1)); echo $i > /tmp/count; echo $i; sleep 0.05; done
"""
#: what the container says of itself, seen from inside all of its namespaces
LOOK = """
hostname; cat /proc/1/mountinfo; cat /proc/1/uid_map /proc/1/gid_map /proc/1/setgroups; cat /proc/1/cgroup
grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Cap|NSpid)' /proc/1/status; cat /proc/1/oom_score_adj
cat /dev/shm/file; ls -ln / /dev /dev/shm /proc/sys/kernel/hostname; ls /sys/class/net; id
"""


@dataclass
class Container:
    """A running container; `python` runs the engine, as its user."""

    bundle: Path
    python: Sequence[str]
    pid: int

    def count(self) -> int:
        """How far a file of its own is; waits for a number that is being written."""
        told, deadline = self.bundle / "rootfs/tmp/count", time.monotonic() + 60
        while not (text := told.read_text().strip() if told.exists() else ""):
            assert time.monotonic() < deadline, (self.bundle / "log").read_text()
            time.sleep(0.001)
        return int(text)

    def logged(self) -> int:
        """How far its log is, also when it is gone: that may be while it writes its number."""
        return (self.bundle / "log").read_text().count("\n")

    def goes_on(self) -> None:
        before, deadline = self.logged(), time.monotonic() + 60
        while self.logged() <= before:
            assert time.monotonic() < deadline, f"it stands still at {before}"
            time.sleep(0.02)

    def look(self) -> list[str]:
        """What it says, without the numbers that are the kernel's."""
        text = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", "/bin/busybox", "sh", "-c", LOOK],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        text = re.sub(r"(?m)^\d+ \d+ \d+:\d+ ", "", text)
        text = re.sub(r" (shared|master):\d+", r" \1", text)
        text = re.sub(r"(?m)^([a-z-][rwxsStT-]{9}) +\d+ ", r"\1 ", text)  # how many processes /proc has
        text = re.sub(r"(?m)^NSpid:\t\d+\t", "NSpid:\t", text)
        text = re.sub(r"\w{3} +\d+ \d+:\d\d", "then", text)
        # whose the directory of message queues is depends on who made the namespace: docs/user-namespaces.md, Limits
        return [line for line in text.splitlines() if not line.endswith("then mqueue")]

    def limits(self) -> dict[str, dict[str, bytes]]:
        """What is set in its cgroups, by hierarchy; those of the surroundings say nothing."""
        found = {}
        here = cgroupfs.places(HostPid(os.getpid()))
        hierarchies = cgroupfs.hierarchies(here)
        for name, path in cgroupfs.places(HostPid(self.pid)).items():
            directory = hierarchies[name].directory(path) if name in hierarchies else None
            if directory is not None and path != here[name]:
                found[f"{name}:{os.fsdecode(path)}"] = settings.current(directory)
        return found

    def engine(self, *arguments: str | Path) -> str:
        done = subprocess.run(
            [*self.python, "-m", "pipeline", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT if self.python[0] == sys.executable else "/",
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def contain(nothing_left_behind: None, workshop: Workshop) -> Iterator[Callable[..., Container]]:
    """Starts one; whatever is left of them is killed and deleted at the end."""
    started: list[tuple[Sequence[str], Container]] = []

    def contain(
        user: Sequence[str],
        python: Sequence[str],
        owner: tuple[int, int],
        rootless: bool,
        change: Callable[[Any], None],
    ) -> Container:
        bundle = workshop.directory()
        for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
            (bundle / "rootfs" / name).mkdir(parents=True)
        shutil.copy(BUSYBOX, bundle / "rootfs/bin/busybox")
        for name in ("sh", "sleep", "cat", "ls", "id", "hostname", "grep"):
            (bundle / "rootfs/bin" / name).symlink_to("busybox")
        runtime = [*user, "runc", "--root", str(bundle / "state")]
        shutil.chown(bundle, *(owner if rootless else (0, 0)))
        subprocess.run(
            [*runtime, "spec", *(["--rootless"] if rootless else [])], cwd=bundle, check=True, timeout=20
        )
        config = json.loads((bundle / "config.json").read_text())
        config["process"].update(terminal=False, args=["/bin/sh", "-c", COUNTS])
        config["root"]["readonly"] = False
        config["hostname"] = "in-a-container"
        change(config)
        (bundle / "config.json").write_text(json.dumps(config))
        for path in (bundle / "rootfs").rglob("*"):
            os.chown(path, *owner, follow_symlinks=False)
        os.chown(bundle / "rootfs", *owner)
        name = f"pipeline-test-{os.getpid()}"
        with open(bundle / "log", "wb") as log:
            if rootless:
                os.fchown(log.fileno(), *owner)
            done = subprocess.run(
                [*runtime, "run", "--detach", "--pid-file", "pid", name],
                cwd=bundle,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=30,
            )
        container = Container(bundle, python, 0)
        started.append(([*runtime, "delete", "--force", name], container))
        assert done.returncode == 0, (bundle / "log").read_text()
        container.pid = int((bundle / "pid").read_text())
        return container

    yield contain
    for delete, container in started:
        if container.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(container.pid, signal.SIGKILL)
            assert not reap([container.pid], 10)
        subprocess.run(delete, check=False, capture_output=True, timeout=30)


def carried(container: Container, image: Path) -> None:
    """Dump a container and restore it; it is what it was, and goes on."""
    container.goes_on()
    before, count, limits = container.look(), container.logged(), container.limits()
    container.engine("dump", "--pid", str(container.pid), "--to", image)
    assert not reap([container.pid])
    stopped = container.logged()
    container.pid = int(container.engine("restore", "--from", image, "--detach"))
    container.goes_on()
    assert container.logged() > stopped >= count
    assert container.count() > stopped
    assert container.look() == before
    assert container.limits() == limits
    log = (container.bundle / "log").read_text().split()
    assert log == [str(number) for number in range(1, len(log) + 1)], "a line is lost or doubled"
    assert len(log) > stopped


def test_a_container_with_a_user_namespace(contain: Callable[..., Container], tmp_path: Path) -> None:
    def change(config: Any) -> None:
        config["linux"]["namespaces"] += [{"type": "user"}, {"type": "cgroup"}]
        for name in ("uidMappings", "gidMappings"):
            config["linux"][name] = [{"containerID": 0, "hostID": 100_000, "size": 65_536}]
        config["linux"]["resources"] |= {
            "pids": {"limit": 77},
            "memory": {"limit": 1 << 28},
            "cpu": {"shares": 300},
        }

    container = contain([], [sys.executable], (100_000, 100_000), rootless=False, change=change)
    if "pids" in cgroupfs.places(HostPid(os.getpid())):  # version 1
        assert any(one.get("pids.max") == b"77" for one in container.limits().values())
        assert any(one.get("devices.list", b"a") != b"a *:* rwm" for one in container.limits().values())
    carried(container, tmp_path / "first")
    carried(container, tmp_path / "second")


def test_a_rootless_container(contain: Callable[..., Container]) -> None:
    as_user = [
        *("setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups", "env", "HOME=/tmp"),
        f"PYTHONPATH={os.pathsep.join([str(ROOT), *filter(None, sys.path)])}",
        "PYTHONDONTWRITEBYTECODE=1",
    ]
    container = contain(as_user, [*as_user, find_python()], (UID, GID), rootless=True, change=lambda _: None)
    carried(container, container.bundle / "image")
