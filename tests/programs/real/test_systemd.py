"""systemd as the first process of a container: services in cgroups of their own, with limits, below its own root."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import cgroupfs
from pipeline.resources.cgroups import settings
from tests.harness.tree import PATIENCE_S, ROOT, Workshop, children_of, engine, family_of, reap, said

SYSTEMD = Path("/lib/systemd/systemd")
HERE = cgroupfs.places(HostPid(os.getpid()))
POINTS = {name: os.fsdecode(found.point) for name, found in cgroupfs.hierarchies(HERE).items()}
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not SYSTEMD.exists(), reason="missing here: systemd (Debian's systemd)"),
    pytest.mark.skipif(
        not all(os.access(point, os.W_OK) for point in POINTS.values()) or "" not in POINTS,
        reason="no cgroups may be made here",
    ),
]

#: a service that counts, with limits; one that a timer starts over and over; and the targets that systemd wants
UNITS = {
    "basic.target": "Requires=counter.service ticker.timer\nAfter=counter.service",
    "counter.service": "[Service]\nExecStart=/bin/sh {directory}/count\nTasksMax=50\nMemoryMax=200M",
    "ticker.timer": "[Timer]\nOnActiveSec=100ms\nOnUnitInactiveSec=100ms\nAccuracySec=1ms",
    "ticker.service": "[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo >> {directory}/ticks'",
    **dict.fromkeys(("sysinit.target", "shutdown.target", "rescue.target", "emergency.target"), ""),
}
COUNT = """
i=0
while true; do
    i=$((i + 1))
    echo $i > {directory}/.count
    mv {directory}/.count {directory}/count.now
    sleep 0.02
done
"""

UNSHARE = "unshare --pid --fork --kill-child --mount --cgroup --ipc --uts --net --mount-proc"
IN_A_USER_NAMESPACE = (
    f"{sys.executable} -m pipeline run --userns=0:100000:65536"
    " --pidns --mntns --cgroupns --ipcns --utsns --netns --"
)

#: joins a cgroup in every hierarchy, and is systemd of a container in namespaces of its own
OUTER = """
for point in {points}; do
    mkdir -p $point/{name}
    for file in cpuset.cpus cpuset.mems; do
        if [ -e $point/{name}/$file ]; then cat $point/$file > $point/{name}/$file; fi
    done
    if [ -n "{owner}" ]; then
        chown {owner} $point/{name} $point/{name}/cgroup.procs
        for file in cgroup.subtree_control cgroup.threads; do
            if [ -e $point/{name}/$file ]; then chown {owner} $point/{name}/$file; fi
        done
    fi
    echo $$ > $point/{name}/cgroup.procs
done
exec {within} sh -e {directory}/inner
"""
INNER = """
mount -t tmpfs none /run
mount -t tmpfs -o mode=0755 none /sys/fs/cgroup
for point in {points}; do
    kind="-t cgroup -o $(basename $point)"
    case $point in
        */systemd) kind="-t cgroup -o none,name=systemd" ;;
        */unified) kind="-t cgroup2" ;;
    esac
    mkdir $point
    mount $kind none $point
done
mkdir {directory}/dev
mount -t tmpfs -o mode=0755 none {directory}/dev
for name in null zero full random urandom tty; do
    touch {directory}/dev/$name
    mount --bind /dev/$name {directory}/dev/$name
done
mkdir {directory}/dev/pts {directory}/dev/shm {directory}/dev/mqueue
for name in console kmsg; do
    touch {directory}/dev/$name
    mount --bind /dev/null {directory}/dev/$name
done
mount -t tmpfs none {directory}/dev/shm
mount --rbind {directory}/dev /dev
mkdir /run/units
cp {directory}/units/* /run/units
export container=test SYSTEMD_UNIT_PATH=/run/units
exec {systemd} --system --unit=basic.target --log-target=null </dev/null >/dev/null 2>&1
"""


class Container:
    """A running systemd. `pid` is its pid here, `name` that of its cgroups, `above` of the one that these are in."""

    def __init__(self, directory: Path, owner: int) -> None:
        self.directory = directory
        self.name = f"pipeline-test-{uuid.uuid4().hex[:8]}"
        self.above = ""
        (directory / "units").mkdir()
        words = {
            "directory": directory, "name": self.name, "points": " ".join(POINTS.values()), "systemd": SYSTEMD,
            "owner": f"{owner}:{owner}" if owner else "",
            "within": IN_A_USER_NAMESPACE if owner else UNSHARE,
        }  # fmt: skip
        for name, text in UNITS.items():
            unit = "[Unit]\nDefaultDependencies=no\n" + text
            (directory / "units" / name).write_text(unit.replace("{directory}", str(directory)))
        for name, text in (("outer", OUTER), ("inner", INNER), ("count", COUNT)):
            for word, value in words.items():
                text = text.replace("{" + word + "}", str(value))
            (directory / name).write_text(text)
        with (directory / "log").open("wb") as log:
            self._around = subprocess.Popen(
                ["sh", "-e", directory / "outer"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.wait(lambda: self.count() > 0 and self.ticks() > 0)
        (self.pid,) = children_of(self._around.pid)
        for hierarchy, path in HERE.items():
            if hierarchy in POINTS:  # who is around it lives elsewhere: the cgroups are the container's own
                place = Path(POINTS[hierarchy] + os.fsdecode(path)) / "cgroup.procs"
                place.write_text(str(self._around.pid))

    def wait(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, (self.directory / "log").read_text()
            time.sleep(0.01)

    def count(self) -> int:
        try:
            return int((self.directory / "count.now").read_text())
        except FileNotFoundError:
            return 0

    def ticks(self) -> int:
        try:
            return (self.directory / "ticks").read_text().count("\n")
        except FileNotFoundError:
            return 0

    def goes_on(self) -> None:
        count, ticks = self.count(), self.ticks()
        self.wait(lambda: self.count() > count + 3 and self.ticks() > ticks + 2)

    def units(self) -> dict[str, dict[str, bytes]]:
        """What is set in the cgroup of every unit that stays, wherever they are."""
        found = {}
        for point in POINTS.values():
            for directory, _, _ in os.walk(Path(point) / self.above / self.name):
                if "ticker" not in directory:
                    unit = directory.replace(f"/{self.above}/", "/") if self.above else directory
                    found[unit] = settings.current(os.fsencode(directory))
        return found

    def places(self) -> dict[str, dict[str, bytes]]:
        """Where the processes that stay are, by their names."""
        found = {}
        prefix = os.fsencode(f"/{self.above}") if self.above else b""
        for pid in family_of(self.pid):
            name = _comm(pid)  # a child of a shell has its name until it executes a program, or ends
            if pid == self.pid or (name == "sh" and _counts(pid)):
                places = cgroupfs.places(HostPid(pid))
                found[name] = {n: p.removeprefix(prefix) for n, p in places.items() if n in POINTS}
        return found

    def still_looks_after_services(self) -> None:
        """One that is killed is seen to have ended."""
        root = Path(POINTS[""]) / self.above / self.name
        assert list(root.rglob("counter.service"))
        os.kill(next(pid for pid in family_of(self.pid) if _counts(pid)), signal.SIGKILL)
        # os.walk passes over what is removed while it looks
        self.wait(lambda: not any("counter.service" in names for _, names, _ in os.walk(root)))

    def close(self) -> None:
        for pid in (getattr(self, "pid", 0), self._around.pid):
            if pid and os.path.exists(f"/proc/{pid}"):
                os.kill(pid, signal.SIGKILL)
        reap([getattr(self, "pid", 0) or self._around.pid, self._around.pid])
        self._around.returncode = 0
        self.remove_cgroups()

    def remove_cgroups(self) -> None:
        for point in POINTS.values():
            for directory, _, _ in os.walk(Path(point) / (self.above or self.name), topdown=False):
                deadline = time.monotonic() + PATIENCE_S
                while os.path.isdir(directory):
                    try:
                        os.rmdir(directory)
                    except OSError:
                        assert time.monotonic() < deadline, directory
                        time.sleep(0.01)


@pytest.fixture
def container(nothing_left_behind: None, workshop: Workshop) -> Iterator[Callable[[int], Container]]:
    made: list[Container] = []

    def start(owner: int) -> Container:
        made.append(Container.__new__(Container))
        made[-1].__init__(workshop.directory(), owner)  # type: ignore[misc]
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.parametrize("owner", [0, 100_000], ids=["of the host's root", "in a user namespace"])
def test_systemd_goes_on_with_its_services(
    container: Callable[[int], Container], tmp_path: Path, owner: int
) -> None:
    box = container(owner)
    box.goes_on()
    units, places = box.units(), box.places()
    assert any(b"/counter.service" in path for path in places["sh"].values())
    assert box.pid != 1
    done = engine("dump", "--pid", box.pid, "--to", tmp_path / "running", "--leave-running")
    assert done.returncode == 0, said(done)
    box.goes_on()
    family = family_of(box.pid)
    done = engine("dump", "--pid", box.pid, "--to", tmp_path / "image")
    assert done.returncode == 0, said(done)
    assert not reap(family)
    count, ticks = box.count(), box.ticks()
    box.remove_cgroups()
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    box.pid = int(done.stdout)
    assert box.count() >= count
    assert box.ticks() >= ticks
    box.goes_on()
    assert box.units() == units
    assert box.places() == places
    box.still_looks_after_services()


@pytest.mark.parametrize("owner", [0, 100_000], ids=["of the host's root", "in a user namespace"])
def test_systemd_moves_with_its_services(
    container: Callable[[int], Container], secret: Path, owner: int
) -> None:
    """The destination has pids of its own, and makes the cgroups elsewhere: those of the source are there as long."""
    box = container(owner)
    box.goes_on()
    units, places, family = box.units(), box.places(), family_of(box.pid)
    there = f"{box.name}-there"
    serve = [
        "--listen",
        "127.0.0.1:0",
        "--once",
        "--secret-file",
        secret,
        "--new-pidns",
        "--cgroup",
        f"/{there}",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", "serve", *serve],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            to = server.stdout.readline().removeprefix("listening on ").strip()
            done = engine("migrate", "--pid", box.pid, "--to", to, "--secret-file", secret)
            assert done.returncode == 0, said(done)
            out, err = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert not reap(family)
    box.remove_cgroups()
    box.above = there
    box.pid = int(out.rpartition("restored: root pid ")[2].split()[0])
    box.goes_on()
    assert box.units() == units
    assert box.places() == places
    box.still_looks_after_services()


def _counts(pid: int) -> bool:
    """Whether it is the shell of counter.service."""
    try:
        return _comm(pid) == "sh" and b"/counter.service" in cgroupfs.places(HostPid(pid)).get("", b"")
    except OSError:  # it has just ended
        return False


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:  # it has just ended
        return ""
