"""Cgroups that only a tree lives in: made again with their limits, members, owners, and what begins at them."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.image.schema import Cgroup
from pipeline.kernel import cgroupfs, procfs
from pipeline.resources.cgroups import settings
from pipeline.resources.cgroups.making import CgroupMaking
from tests.harness.carry import carry
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop, dump, engine, reap, restore, said

HERE = cgroupfs.places(HostPid(os.getpid()))
HIERARCHIES = {
    name: os.fsdecode(found.point)
    for name, found in cgroupfs.hierarchies(HERE).items()
    if found.root == b"/" and os.access(found.point, os.W_OK)
}
V1 = [name for name in ("pids", "memory", "cpu", "cpuset", "devices") if name in HIERARCHIES]
pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        "" not in HIERARCHIES, reason="no cgroup hierarchy of version 2 may be written to here"
    ),
]
NAME = f"pipeline-test-{uuid.uuid4().hex[:8]}"


def remove(directory: Path) -> None:
    """A cgroup and all below it; whoever is in it is about to end."""
    if directory.is_dir():
        for below in directory.iterdir():
            if below.is_dir():
                remove(below)
        deadline = time.monotonic() + 60
        while True:
            try:
                directory.rmdir()
                return
            except OSError:
                assert time.monotonic() < deadline, directory
                time.sleep(0.01)


class Groups:
    """Cgroups of a test, by hierarchy and path below its own."""

    def directory(self, hierarchy: str, path: str = "") -> Path:
        return Path(HIERARCHIES[hierarchy]) / NAME / path

    def make(self, hierarchy: str, path: str = "") -> Path:
        found = self.directory(hierarchy, path)
        for place in (*reversed(found.parents), found):
            if not place.exists():
                place.mkdir()
                for name in ("cpuset.cpus", "cpuset.mems") if hierarchy == "cpuset" else ():
                    (place / name).write_text((place.parent / name).read_text())
        return found

    def put(self, pid: int, hierarchy: str, path: str = "", file: str = "cgroup.procs") -> None:
        (self.directory(hierarchy, path) / file).write_text(str(pid))

    def settings(self) -> dict[str, dict[str, bytes]]:
        """Everything that is set, whose it is, and the attributes, by directory."""
        found: dict[str, dict[str, bytes]] = {}
        for hierarchy, point in HIERARCHIES.items():
            for directory, _, names in os.walk(Path(point) / NAME):
                place = os.fsencode(directory)
                one = dict(settings.current(place))
                for name in ("", *names):
                    status = os.stat(Path(directory) / name)
                    one[f"owner {name}"] = f"{status.st_uid}:{status.st_gid} {status.st_mode:o}".encode()
                one |= {name: os.getxattr(directory, name) for name in os.listxattr(directory)}
                for name in ("cgroup.type", "cgroup.subtree_control"):
                    if name in names:
                        one[name] = (Path(directory) / name).read_bytes()
                found[f"{hierarchy} {directory}"] = one
        return found

    def remove(self) -> None:
        for point in HIERARCHIES.values():
            remove(Path(point) / NAME)


@pytest.fixture
def groups(nothing_left_behind: None) -> Iterator[Groups]:
    groups = Groups()
    yield groups
    groups.remove()


def places(tree: Tree) -> dict[int, dict[int, dict[str, bytes]]]:
    """Where every thread is, by pid and thread; where it is in the surroundings is not said."""
    found: dict[int, dict[int, dict[str, bytes]]] = {}
    for pid in tree.pids():
        found[pid] = {
            int(tid): {n: p for n, p in cgroupfs.places(HostPid(pid), int(tid)).items() if NAME.encode() in p}
            for tid in os.listdir(f"/proc/{pid}/task")
        }
    return found


def arrange(groups: Groups, tree: Tree) -> None:
    """Limits in every hierarchy that there is; the processes in several cgroups, also above and below each other."""
    root, *others = tree.pids()
    groups.make("", "services/one")
    groups.make("", "services/two")
    (groups.directory("") / "cgroup.max.depth").write_text("7")
    (groups.directory("", "services") / "cgroup.max.descendants").write_text("55")
    (groups.directory("", "services/two") / "cgroup.pressure").write_text("0")
    groups.put(root, "", "services/one")
    for pid in others:
        groups.put(pid, "", "services/two")
    if "devices" in V1:  # only without a cgroup below
        groups.make("devices")
        (groups.directory("devices") / "devices.deny").write_text("a")
        for line in ("c 1:* rwm", "c 5:2 rw", "c 136:* rwm"):
            (groups.directory("devices") / "devices.allow").write_text(line)
    for name in V1:
        groups.make(name, "inner")
        groups.put(root, name)
        for pid in others[::2]:
            groups.put(pid, name, "inner")
    if "pids" in V1:
        (groups.directory("pids") / "pids.max").write_text("321")
    if "memory" in V1:
        (groups.directory("memory") / "memory.limit_in_bytes").write_text(str(1 << 30))
        (groups.directory("memory", "inner") / "memory.soft_limit_in_bytes").write_text(str(1 << 28))
        (groups.directory("memory", "inner") / "memory.swappiness").write_text("7")
        (groups.directory("memory", "inner") / "memory.oom_control").write_text("1")
    if "cpu" in V1:
        (groups.directory("cpu") / "cpu.shares").write_text("777")
        (groups.directory("cpu", "inner") / "cpu.cfs_period_us").write_text("50000")
        (groups.directory("cpu", "inner") / "cpu.cfs_quota_us").write_text("45000")
    if "cpuset" in V1:
        (groups.directory("cpuset", "inner") / "cpuset.cpus").write_text("0")


def hand_out(groups: Groups, uid: int) -> None:
    """Delegate a cgroup: to somebody whose ids the tree's first user namespace has."""
    directory = groups.directory("", "services/two")
    for path in (directory, directory / "cgroup.procs", directory / "cgroup.subtree_control"):
        os.chown(path, uid, uid + 1)
    directory.chmod(0o775)
    other = groups.directory("", "services/one")  # by permissions alone
    other.chmod(0o700)
    (other / "cgroup.procs").chmod(0o646)
    os.setxattr(directory, "user.delegate", b"1")
    os.setxattr(directory, "trusted.invocation_id", b"0123")


def test_a_cgroup_may_be_called_anything_but_two_lines() -> None:
    places = cgroupfs.parse_places(b"1:cpu:/a\r:b\n0::/ended (deleted)\n")
    assert places == {"cpu": b"/a\r:b"}


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
def test_membership_limits_and_owners(
    groups: Groups, start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    tree = start("processes", setting)
    arrange(groups, tree)
    hand_out(groups, 100_003)
    members, before = places(tree), groups.settings()
    assert any(groups_of for threads in members.values() for groups_of in threads.values())
    with_groups_left(tree, tmp_path / "left")
    assert groups.settings() == before
    family = tree.pids()
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image")
    assert done.returncode == 0, said(done)
    assert not reap(family)
    groups.remove()
    restore(tree, tmp_path / "image")
    assert places(tree) == members
    assert groups.settings() == before
    tree.check()
    assert tree.end() == 0


def with_groups_left(tree: Tree, image: Path) -> None:
    """Carried while its cgroups, empty meanwhile, are still there."""
    members = places(tree)
    carry(tree, image)
    assert places(tree) == members


def test_threads_elsewhere(groups: Groups, start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("threads", DEPTH_1)
    groups.make("", "workers")
    tids = sorted(map(int, os.listdir(f"/proc/{tree.pid}/task")))
    for pid in tree.pids():
        groups.put(pid, "")
    (groups.directory("", "workers") / "cgroup.type").write_text("threaded")
    groups.put(tids[1], "", "workers", "cgroup.threads")
    if "pids" in V1:
        groups.make("pids", "workers")
        groups.put(tids[2], "pids", "workers", "tasks")
    members = places(tree)
    assert members[tree.pid][tids[1]][""].endswith(b"/workers")
    dump(tree, tmp_path / "image")
    restore(tree, tmp_path / "image")
    assert places(tree) == members
    tree.check()


def test_a_process_whose_first_thread_has_ended(
    groups: Groups, start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("leaderless", DEPTH_1)
    groups.make("", "inner")
    for pid in tree.pids():
        groups.put(pid, "", "inner")
    dump(tree, tmp_path / "image")
    groups.remove()
    restore(tree, tmp_path / "image")
    assert {cgroupfs.places(HostPid(pid))[""] for pid in tree.pids()} == {f"/{NAME}/inner".encode()}
    tree.check()


def test_a_cgroup_that_others_live_in_is_of_the_surroundings(
    groups: Groups, start: Callable[..., Tree], tmp_path: Path
) -> None:
    groups.make("", "shared/own")
    tree, neighbour = start("quiet", DEPTH_1), start("quiet")
    groups.put(neighbour.pid, "", "shared")
    groups.put(tree.pid, "", "shared/own")
    (groups.directory("", "shared") / "cgroup.max.depth").write_text("9")
    (groups.directory("", "shared/own") / "cgroup.max.depth").write_text("3")
    dump(tree, tmp_path / "image")
    (groups.directory("", "shared") / "cgroup.max.depth").write_text("8")
    remove(groups.directory("", "shared/own"))
    restore(tree, tmp_path / "image")
    assert (groups.directory("", "shared") / "cgroup.max.depth").read_text() == "8\n"
    assert (groups.directory("", "shared/own") / "cgroup.max.depth").read_text() == "3\n"
    assert cgroupfs.places(HostPid(tree.pid))[""] == f"/{NAME}/shared/own".encode()
    # and in the shared one itself a tree is where its restorer is
    groups.put(tree.pid, "", "shared")
    dump(tree, tmp_path / "second")
    restore(tree, tmp_path / "second")
    assert cgroupfs.places(HostPid(tree.pid))[""] == HERE[""]


def test_it_is_made_where_the_user_says(groups: Groups, start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet")
    groups.make("", "mine/below")
    groups.put(tree.pid, "", "mine/below")
    (groups.directory("", "mine/below") / "cgroup.max.depth").write_text("3")
    dump(tree, tmp_path / "image")
    pid = tree.pid
    for option, where in (
        (f"/{NAME}/elsewhere", f"/{NAME}/elsewhere/{NAME}/mine/below"),
        ("ignore", os.fsdecode(HERE[""])),
    ):
        done = engine("restore", "--from", tmp_path / "image", "--detach", "--cgroup", option)
        assert done.returncode == 0, said(done)
        assert os.fsdecode(cgroupfs.places(HostPid(pid))[""]) == where
        os.kill(pid, signal.SIGKILL)
        assert not reap([pid])
    assert (groups.directory("", f"elsewhere/{NAME}/mine/below") / "cgroup.max.depth").read_text() == "3\n"
    done = engine("restore", "--from", tmp_path / "image", "--cgroup", "nowhere")
    assert done.returncode == 2
    assert "begins with /" in done.stderr


def test_left_behind_by_the_dump(groups: Groups, start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet", DEPTH_1)
    groups.make("")
    groups.put(tree.pid, "")
    done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", "--cgroup", "ignore")
    assert done.returncode == 0, said(done)
    assert not reap([tree.pid])
    restore(tree, tmp_path / "image")
    assert cgroupfs.places(HostPid(tree.pid)) == HERE


def test_others_live_in_it_at_the_destination(
    groups: Groups, start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("quiet")
    groups.make("", "one")
    groups.put(tree.pid, "", "one")
    dump(tree, tmp_path / "image")
    other = start("quiet")
    groups.put(other.pid, "", "one")
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 3, said(done)
    assert f"/{NAME}/one" in done.stderr
    assert "others live in it" in done.stderr
    assert "--cgroup" in done.stderr


def test_a_limit_that_this_host_refuses_leaves_nothing(
    groups: Groups, start: Callable[..., Tree], tmp_path: Path
) -> None:
    """The tree's cgroups come last; what was made by then goes with it."""
    tree = start("quiet")
    groups.make("", "one")
    groups.put(tree.pid, "", "one")
    os.setxattr(groups.directory("", "one"), "trusted.much", b"x" * 100)
    if "cpu" in V1:
        groups.make("cpu")
        groups.put(tree.pid, "cpu")
        (groups.directory("cpu") / "cpu.cfs_quota_us").write_text("90000")
    dump(tree, tmp_path / "image")
    groups.remove()
    if "cpu" not in V1:
        pytest.skip("no hierarchy with a limit that depends on the one above")
    above = groups.make("cpu", "above")
    (above / "cpu.cfs_quota_us").write_text("20000")
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--cgroup", f"/{NAME}/above")
    assert done.returncode == 1, said(done)
    assert "cpu.cfs_quota_us may not be" in done.stderr
    assert not list(above.glob("*/"))
    assert not groups.directory("", "above").exists()


@pytest.mark.parametrize("hierarchy", [name for name in ("", "freezer") if name in HIERARCHIES])
def test_frozen_is_refused_and_nothing_hangs(
    groups: Groups, start: Callable[..., Tree], tmp_path: Path, hierarchy: str
) -> None:
    tree = start("quiet")
    directory = groups.make(hierarchy)
    groups.put(tree.pid, hierarchy)
    knob, on, off = ("freezer.state", "FROZEN", "THAWED") if hierarchy else ("cgroup.freeze", "1", "0")
    (directory / knob).write_text(on)
    try:
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", timeout_s=20)
    finally:
        (directory / knob).write_text(off)
    assert done.returncode == 3, said(done)
    assert "is frozen" in done.stderr
    tree.check()


class Inside:
    """A tree whose cgroup namespace begins at a cgroup of its own; more of its processes are below that."""

    def __init__(self, groups: Groups, workshop: Workshop, setting: Setting) -> None:
        groups.make("", "box")
        into = f'echo $$ > "{groups.directory("", "box")}/cgroup.procs"'
        if "pids" in V1:
            groups.make("pids", "box")
            into += f'; echo $$ > "{groups.directory("pids", "box")}/cgroup.procs"'
        within = ["sh", "-c", into + '; exec 2>/dev/null; exec unshare --cgroup --fork "$@"', "-"]
        self.tree = Tree.start(workshop, "processes", setting, within=within)
        (self.wrapper,) = [
            p for p in cgroupfs.members(os.fsencode(groups.directory("", "box"))) if _name_of(p) == "unshare"
        ]
        # the one around the tree lives elsewhere: only the tree is in the box
        for name, path in HERE.items():
            if name in HIERARCHIES:
                (Path(HIERARCHIES[name] + os.fsdecode(path)) / "cgroup.procs").write_text(str(self.wrapper))

    def views(self) -> dict[int, list[bytes]]:
        """The names of everybody's cgroups as the root of the tree says them."""
        found = {}
        for pid in self.tree.pids():
            child = os.fork()
            if child == 0:
                fd = os.open(f"/proc/{self.tree.pid}/ns/cgroup", os.O_RDONLY)
                from pipeline.kernel.syscalls import CLONE, setns

                setns(fd, CLONE.NEWCGROUP)
                Path(self.tree.directory / "view").write_bytes(Path(f"/proc/{pid}/cgroup").read_bytes())
                os._exit(0)
            os.waitpid(child, 0)
            text = (self.tree.directory / "view").read_bytes()
            found[pid] = [line for line in text.splitlines() if line.split(b":")[1] in {b"", b"pids"}]
        (self.tree.directory / "view").unlink()
        return found

    def close(self) -> None:
        self.tree.kill()
        with suppress(ProcessLookupError):
            os.kill(self.wrapper, signal.SIGKILL)
        reap([self.wrapper])


def _name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_2], ids=lambda s: s.name)
def test_a_cgroup_namespace_with_members_below_its_root(
    groups: Groups, workshop: Workshop, tmp_path: Path, setting: Setting
) -> None:
    inside = Inside(groups, workshop, setting)
    try:
        tree = inside.tree
        groups.make("", "box/child")
        for pid in tree.pids()[1:]:
            groups.put(pid, "", "box/child")
        members, views = places(tree), inside.views()
        assert {line.rpartition(b":")[2] for line in views[tree.pids()[1]]} == {b"/", b"/child"}
        family = tree.pids()
        done = engine(
            "dump", "--pid", tree.pid, "--to", tmp_path / "left", "--cgroup", "ignore", "--leave-running"
        )
        assert done.returncode == 0, said(done)
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image")
        assert done.returncode == 0, said(done)
        assert not reap([inside.wrapper, *family])
        groups.remove()
        left_behind(tree, tmp_path / "left")
        restore(tree, tmp_path / "image")
        assert places(tree) == members
        assert inside.views() == views
        tree.check()
    finally:
        inside.close()


def left_behind(tree: Tree, image: Path) -> None:
    """From an image without its cgroups the tree is, and its cgroup namespace begins, where its restorer is."""
    restore(tree, image)
    family = tree.pids()
    living = [HostPid(pid) for pid in family if procfs.stat(HostPid(pid)).state != "Z"]
    assert {pid: found for pid in living if (found := cgroupfs.places(pid)) != HERE} == {}
    tree.check()
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    assert not reap(family)


def test_every_file_that_can_be_written_is_in_the_table_or_left_out_by_name(groups: Groups) -> None:
    for hierarchy in HIERARCHIES:
        directory = groups.make(hierarchy)
        writable = {
            path.name for path in directory.iterdir() if path.is_file() and path.stat().st_mode & 0o222
        }
        unknown = {n for n in writable if not settings.default_of(n)[0] and n not in settings.NOT_KEPT}
        # a file that some kernels have on top of those that are documented
        assert not unknown - {"memory.shown_ram_in_bytes"}, (hierarchy, unknown)


def test_paths_of_a_bad_image_stay_in_the_hierarchy() -> None:
    for path in (b"/../../etc", b"relative", b"/a/./b", b"/a\nb", b"/", b"", b"//", b"/a/"):
        one = Cgroup(index=0, hierarchy="", path=path, own=True)
        for where in ("keep", "/elsewhere"):
            making = CgroupMaking({0: one}, {0}, where, lambda one: one.id, lambda one: one.id)
            assert [blocker.reason for blocker in making.check()] == ["this is no path of a cgroup"], path


def test_who_visits_a_cgroup_is_back_behind_it(groups: Groups, start: Callable[..., Tree]) -> None:
    """One of version 2 in which somebody is would not be opened for those below."""
    tree = start("quiet")
    one = Cgroup(index=0, hierarchy="", path=f"/{NAME}/root".encode(), own=True)
    making = CgroupMaking({0: one}, set(), "keep", lambda one: one.id, lambda one: one.id)
    making.make()
    try:
        with making.visiting([0], HostPid(tree.pid)):
            assert cgroupfs.places(HostPid(tree.pid))[""] == one.path
        assert cgroupfs.places(HostPid(tree.pid)) == HERE
    finally:
        making.close()


def test_attributes_of_a_bad_image_are_those_that_a_cgroup_keeps(groups: Groups) -> None:
    one = Cgroup(
        index=0, hierarchy="", path=f"/{NAME}/bad".encode(), own=True, xattrs={"security.capability": b"x"}
    )
    making = CgroupMaking({0: one}, {0}, "keep", lambda one: one.id, lambda one: one.id)
    assert not list(making.check())
    try:
        making.make()
        with pytest.raises(RebuildError, match=r"security\.capability is of none of the classes"):
            making.settle()
    finally:
        making.close()
    assert not groups.directory("", "bad").exists()


def test_devices_go_by_name() -> None:
    with_device = [d for d in os.listdir("/sys/class/block") if Path(f"/sys/class/block/{d}/dev").exists()]
    if not with_device:
        pytest.skip("no block device here")
    number = Path(f"/sys/class/block/{with_device[0]}/dev").read_text().strip()
    record = settings.to_record({"io.max": f"{number} rbps=1048576".encode(), "pids.max": b"max"})
    assert record == {"io.max": f"{with_device[0]} rbps=1048576".encode()}
    assert list(settings.changes(record, {"io.max": b""})) == [("io.max", f"{number} rbps=1048576".encode())]
    with pytest.raises(settings.UnknownDeviceError, match="nosuch"):
        list(settings.changes({"io.max": b"nosuch rbps=1"}, {"io.max": b""}))
