"""Mount namespaces: made again they show the same mounts, or they are refused by name."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import PipelineError, RebuildError
from pipeline.ids import HostPid, LocalFd
from pipeline.image.schema import Extent, Namespace, UserNamespace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.syscalls import CLONE, PRCTL, mount, open_tree, prctl, syscall, unshare
from pipeline.userns.forest import Forest
from pipeline.userns.idmap import IdMap
from tests.userns.making import (
    captured,
    held,
    in_child,
    made_again,
    making,
    other_keepers,
    own_namespace,
    refused,
)

pytestmark = pytest.mark.root

RDONLY, NOSUID, NODEV, NOEXEC, REMOUNT, NOATIME, MOVE, BIND, REC = 1, 2, 4, 8, 32, 1024, 8192, 4096, 16384
UNBINDABLE, PRIVATE, SLAVE, SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MAPS = [None, "0 100000 65536", "1000 100000 10"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that everybody can reach, with two directories and a file in it."""
    for directory in (tmp_path, *tmp_path.parents):
        if directory == Path("/tmp"):
            break
        directory.chmod(0o755)
    for name in ("a", "b", "a/inner"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("x")
    return tmp_path


def looks(pid: HostPid) -> list[tuple[object, ...]]:
    """What mountinfo says, without the numbers that are the kernel's."""
    return [
        (m.point, m.root, m.options, m.kind, bool(m.shared), bool(m.master), m.unbindable)
        for m in mountinfo(pid)
    ]


def groups(pid: HostPid) -> list[tuple[int, int]]:
    """Peer group and master of every mount, the groups numbered in the order in which they appear."""
    numbers = {0: 0}
    return [
        tuple(numbers.setdefault(group, len(numbers)) for group in (m.shared, m.master))  # type: ignore[misc]
        for m in mountinfo(pid)
    ]


def begin() -> None:
    unshare(CLONE.NEWNS)
    mount(None, b"/", None, REC | PRIVATE)


def only_private(place: bytes) -> None:
    """Nothing but a copy."""


def empty_tmpfs(place: bytes) -> None:
    mount(b"own", place + b"/a", b"tmpfs", NOSUID | NODEV, b"size=1m,mode=711,nr_inodes=77")


def read_only_tmpfs(place: bytes) -> None:
    mount(b"own", place + b"/a", b"tmpfs", RDONLY | NOATIME)


def tmpfs_with_owner(place: bytes) -> None:
    first = int(Path("/proc/self/uid_map").read_text().split()[0])
    mount(b"own", place + b"/a", b"tmpfs", 0)
    os.chown(place + b"/a", first + 3, first + 4)
    os.chmod(place + b"/a", 0o1751)


def bind_directory(place: bytes) -> None:
    mount(place + b"/a", place + b"/b", None, BIND)


def bind_read_only(place: bytes) -> None:
    mount(place + b"/a/inner", place + b"/b", None, BIND)
    mount(None, place + b"/b", None, BIND | REMOUNT | RDONLY | NOSUID | NODEV | NOEXEC)


def bind_file(place: bytes) -> None:
    mount(b"/dev/null", place + b"/file", None, BIND)


def bind_on_itself(place: bytes) -> None:
    mount(place, place, None, BIND)
    mount(None, place, None, BIND | REMOUNT | RDONLY)


def several(place: bytes) -> None:
    mount(b"one", place + b"/b", b"tmpfs", 0)
    mount(place + b"/a", b"/mnt", None, BIND)
    mount(b"two", place + b"/a", b"tmpfs", 0)
    mount(None, b"/sys", None, BIND | REMOUNT | RDONLY)


def terminals(place: bytes) -> None:
    mount(b"devpts", place + b"/a", b"devpts", NOSUID, b"ptmxmode=666,mode=620")


def shared_alone(place: bytes) -> None:
    mount(b"own", place + b"/a", b"tmpfs", 0)
    mount(None, place + b"/a", None, SHARED)
    mount(place, place + b"/b", None, BIND)
    mount(None, place + b"/b", None, UNBINDABLE)


def pivoted(place: bytes) -> None:
    root = place + b"/a"
    mount(root, root, None, BIND)
    mount(b"/usr", root + b"/usr", None, BIND)
    mount(None, root + b"/usr", None, BIND | REMOUNT | RDONLY)
    mount(b"own", root + b"/scratch", b"tmpfs", NOSUID, b"size=1m")
    mount(root + b"/inner", root + b"/proc", None, BIND)
    os.chdir(root)
    syscall(NR.pivot_root, b".\0", b".\0")
    syscall(NR.umount2, b".\0", 2)
    os.chdir("/")


def overlay(place: bytes) -> None:
    mount(b"overlay", b"/mnt", b"overlay", NODEV, b"lowerdir=%s/a:%s/b" % (place, place))


def covered(place: bytes) -> None:
    mount(b"one", place + b"/a", b"tmpfs", 0, b"size=2m")
    os.mkdir(place + b"/a/inner")
    mount(b"two", place + b"/a/inner", b"tmpfs", 0)
    mount(b"three", place + b"/a", b"tmpfs", 0)
    mount(b"four", place + b"/a", b"tmpfs", 0)


def peers(place: bytes) -> None:
    mount(b"own", place + b"/a", b"tmpfs", 0)
    mount(None, place + b"/a", None, SHARED)
    mount(place + b"/a", place + b"/b", None, BIND)


def slave_of_own(place: bytes) -> None:
    peers(place)
    mount(None, place + b"/b", None, SLAVE)


def chain(place: bytes) -> None:
    """Peers, a slave of them that has a peer of its own below, and a slave of those."""
    peers(place)
    for name in (b"/1", b"/2", b"/3"):
        os.mkdir(place + b"/a" + name)
    for name in (b"/a/1", b"/a/2", b"/a/3"):
        mount(place + b"/b", place + name, None, BIND)
        mount(None, place + name, None, PRIVATE)
    for name, of in ((b"/a/1", b"/b"), (b"/a/2", b"/a/1"), (b"/a/3", b"/a/2")):
        mount(None, place + name, None, PRIVATE)
        syscall(NR.move_mount, -100, place + of + b"\0", -100, place + name + b"\0", 0x100)
        mount(None, place + name, None, SLAVE)
        if name != b"/a/3":
            mount(None, place + name, None, SHARED)
    mount(b"inside", place + b"/a/1/2", b"tmpfs", 0)


CARRIED = [
    only_private, empty_tmpfs, read_only_tmpfs, tmpfs_with_owner, bind_directory, bind_read_only, bind_file,
    bind_on_itself, several, terminals, shared_alone, overlay, covered, peers,
    slave_of_own, chain,
]  # fmt: skip


@pytest.mark.parametrize("id_map", MAPS)
@pytest.mark.parametrize("act", CARRIED, ids=lambda act: act.__name__)
def test_mounts_are_made_again(act: Callable[[bytes], None], id_map: str | None, place: Path) -> None:
    def whole() -> None:
        begin()
        act(os.fsencode(place))

    with held(whole, id_map) as pid, made_again(pid, "mnt") as (record, again):
        assert looks(again) == looks(pid)
        assert groups(again) == groups(pid)
        for name in ("a", "b"):
            one, other = (os.stat(f"/proc/{p}/root{place}/{name}") for p in (pid, again))
            assert (one.st_mode, one.st_uid, one.st_gid) == (other.st_mode, other.st_uid, other.st_gid)
        size, again_size = (os.statvfs(f"/proc/{p}/root{place}/a") for p in (pid, again))
        assert (size.f_blocks, size.f_files) == (again_size.f_blocks, again_size.f_files)
        assert own_namespace(captured(again)[0], "mnt").state == record.state


@pytest.mark.parametrize("id_map", MAPS)
def test_another_root_is_the_root_again(id_map: str | None, place: Path) -> None:
    for name in ("usr", "proc", "scratch"):
        (place / "a" / name).mkdir()

    def whole() -> None:
        begin()
        pivoted(os.fsencode(place))

    with held(whole, id_map) as pid, made_again(pid, "mnt") as (record, again):
        assert looks(again) == looks(pid)
        assert len(looks(pid)) == 4
        for path in ("", "/usr", "/proc", "/inner"):
            one, other = (os.stat(f"/proc/{p}/root{path}") for p in (pid, again))
            assert os.path.samestat(one, other), path
        assert not os.path.exists(f"/proc/{again}/root/etc")
        assert own_namespace(captured(again)[0], "mnt").state == record.state


def root_on_tmpfs(place: bytes) -> None:
    """As sandboxes do it: an empty root, and in it what is needed of the old one."""
    root = place + b"/a"
    mount(b"sandbox", root, b"tmpfs", NOSUID | NODEV, b"mode=755")
    for name in (b"/usr", b"/scratch", b"/inner"):
        os.mkdir(root + name)
    mount(b"/usr", root + b"/usr", None, BIND | REC)
    mount(b"scratch", root + b"/scratch", b"tmpfs", NOSUID, b"size=1m")
    mount(place + b"/b", root + b"/inner", None, BIND)
    os.symlink(b"usr/bin", root + b"/bin")
    os.chdir(root)
    syscall(NR.pivot_root, b".\0", b".\0")
    syscall(NR.umount2, b".\0", 2)
    os.chdir("/")


@pytest.mark.parametrize("id_map", MAPS)
def test_a_root_on_tmpfs_is_the_root_again(id_map: str | None, place: Path) -> None:
    def whole() -> None:
        begin()
        root_on_tmpfs(os.fsencode(place))

    with held(whole, id_map) as pid, made_again(pid, "mnt") as (record, again):
        assert looks(again) == looks(pid)
        assert len(looks(pid)) == 4
        for path in ("/usr", "/inner"):
            one, other = (os.stat(f"/proc/{p}/root{path}") for p in (pid, again))
            assert os.path.samestat(one, other), path
        assert sorted(os.listdir(f"/proc/{again}/root")) == ["bin", "inner", "scratch", "usr"]
        assert os.readlink(f"/proc/{again}/root/bin") == "usr/bin"
        assert own_namespace(captured(again)[0], "mnt").state == record.state


def test_a_tmpfs_in_a_directory_that_its_owner_may_not_search(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime gets there before it takes the ids of its container."""
    monkeypatch.chdir(place / "a")
    place.chmod(0o700)

    def whole() -> None:
        begin()
        mount(b"own", b"inner", b"tmpfs", 0)
        os.mkdir("inner/kept")

    with held(whole, MAPS[1]) as pid, made_again(pid, "mnt") as (_, again):
        assert looks(again) == looks(pid)
        assert os.listdir(f"/proc/{again}/root{place}/a/inner") == ["kept"]


def test_looking_at_mounts_that_show_namespaces_leaves_nothing_open(place: Path) -> None:
    def whole() -> None:
        unshare(CLONE.NEWNET | CLONE.NEWIPC | CLONE.NEWCGROUP)
        begin()
        mount(b"sysfs", os.fsencode(place / "a"), b"sysfs", 0)
        mount(b"none", os.fsencode(place / "b"), b"cgroup2", 0)

    with held(whole) as pid:
        before = os.listdir("/proc/self/fd")
        assert not captured(pid)[0].blockers
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (["namespace", b"/mnt", b"", b"uts"], "mount /mnt of the image shows no namespace"),
        (
            ["namespace", b"/mnt", b"", b"uts", 0, b"", None, 99],
            "namespace 99 is no uts namespace of the image",
        ),
        (["namespace", b"/mnt", b"", b"../x", 0, b"", None, 0], "is no ../x namespace of the image"),
        (["namespace", b"/mnt", b"", b"user", 0, b"", None, 9], "the image has no user namespace 9"),
        (["mount", b"/mnt", b"", b"sysfs", 0, b"", None, 9], "namespace 9 is no net namespace of the tree"),
        (
            ["bind", b"/mnt", b"/no-such", b"", 0, b"", None, None, 0, [], 0, [[[0, 5, 1]], [[0, 5, 1]]]],
            "idmapped mount /mnt of mount namespace 8: .*No such file",
        ),
        (
            [
                "bind",
                b"/mnt",
                b"/srv",
                b"",
                0,
                b"",
                None,
                None,
                0,
                [],
                0,
                [[[0, 5, 2], [1, 9, 1]], [[0, 5, 1]]],
            ],
            "overlap inside",
        ),
        (
            ["bind", b"/mnt", b"/srv", b"", 0, b"", None, None, 0, [], 0, [[[0, 5, 2]], []]],
            "it has no gid map",
        ),
    ],
)
def test_steps_of_a_bad_image_are_named(step: list[object], words: str) -> None:
    record = Namespace(index=8, kind="mnt", external=False, state={"steps": [step]})
    with pytest.raises(PipelineError, match=words), making(Forest([UserNamespace(index=0)]), {8: record}):
        pass


def another_root(place: bytes) -> None:
    mount(b"root", place + b"/a", b"tmpfs", 0)
    os.mkdir(place + b"/a/old")
    syscall(NR.pivot_root, place + b"/a", place + b"/a/old")


def test_an_old_root_below_the_new_one(place: Path) -> None:
    def whole() -> None:
        begin()
        another_root(os.fsencode(place))

    with held(whole) as pid, made_again(pid, "mnt") as (_, again):
        assert sorted(looks(again)) == sorted(looks(pid))  # which was made first has changed
        assert os.path.samestat(os.stat(f"/proc/{again}/root/old/etc"), os.stat("/etc"))


def test_unmounted_is_unmounted_again(place: Path) -> None:
    gone = next(m.point for m in reversed(mountinfo(HostPid(os.getpid()))) if m.point.startswith(b"/sys/fs"))

    def whole() -> None:
        begin()
        syscall(NR.umount2, gone, 0)

    with held(whole) as pid, made_again(pid, "mnt") as (_, again):
        assert looks(again) == looks(pid)
        assert gone not in [m.point for m in mountinfo(again)]


@pytest.mark.parametrize("id_map", MAPS[:2])
def test_message_queues_of_the_own_ipc_namespace(id_map: str | None, place: Path) -> None:
    def whole() -> None:
        unshare(CLONE.NEWIPC)
        begin()
        mount(b"mqueue", os.fsencode(place / "a"), b"mqueue", NOSUID)

    with held(whole, id_map) as pid:
        capture, forest = captured(pid)
        assert not capture.blockers
        with making(forest, {n.index: n for n in capture.namespaces}) as keepers:
            mnt, ipc = (own_namespace(capture, kind).index for kind in ("mnt", "ipc"))
            again = other_keepers(keepers)[mnt]
            assert looks(again.pid) == looks(pid)
            # queues made in the ipc namespace are seen at the mount
            maker = other_keepers(keepers)[ipc]
            maker.syscall(NR.setresuid, 0, 0, 0)
            maker.syscall(NR.setresgid, 0, 0, 0)
            maker.syscall(NR.mq_open, b"seen\0", os.O_CREAT | os.O_RDWR, 0o600, 0)
            assert os.listdir(f"/proc/{again.pid}/root{place}/a") == ["seen"]


def bind_of_own_tmpfs(place: bytes) -> None:
    empty_tmpfs(place)
    os.mkdir(place + b"/a/x")
    mount(place + b"/a/x", place + b"/b", None, BIND)
    mount(None, place + b"/a", b"tmpfs", 0)


def parts_of_own_tmpfs(place: bytes) -> None:
    """Two of them; what they are parts of is covered."""
    empty_tmpfs(place)
    for name, point in ((b"x", b"/b"), (b"y", b"/c")):
        os.mkdir(place + b"/a/" + name)
        os.makedirs(place + point, exist_ok=True)
        mount(place + b"/a/" + name, place + point, None, BIND)
    syscall(NR.umount2, place + b"/a", 2)


def slave_of_nothing(place: bytes) -> None:
    peers(place)
    os.open("/proc/self/ns/mnt", os.O_RDONLY)  # keeps the namespace of the master
    unshare(CLONE.NEWNS)
    mount(None, b"/", None, REC | SLAVE)


def covered_terminals(place: bytes) -> None:
    terminals(place)
    mount(b"over", place + b"/a", b"tmpfs", 0)


def message_queues_of_outside(place: bytes) -> None:
    mount(b"mqueue", place + b"/a", b"mqueue", 0)


REFUSED = {
    bind_of_own_tmpfs: "/b (tmpfs) is not carried",
    parts_of_own_tmpfs: "/b (tmpfs) is not carried",
    slave_of_nothing: "is a slave of a mount that is not to be seen",
    covered_terminals: "is covered by another mount",
    message_queues_of_outside: "(mqueue) shows a namespace (ipc) that is not the tree's",
}


@pytest.mark.parametrize("act", REFUSED, ids=lambda act: act.__name__)
def test_mounts_that_are_not_carried(act: Callable[[bytes], None], place: Path) -> None:
    def whole() -> None:
        begin()
        act(os.fsencode(place))

    with held(whole) as pid:
        capture, _ = captured(pid)
        assert any(REFUSED[act] in str(blocker) for blocker in capture.blockers), capture.blockers


def bind_idmapped(place: Path, mapped: HostPid, source: str, point: str) -> None:
    """Bind a directory so that its ids are shown as those that the user namespace of `mapped` maps them to."""
    users = os.open(f"/proc/{mapped}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    tree = open_tree(-100, os.fsencode(place / source))
    attributes = struct.pack("<4Q", 0x100000, 0, 0, users)
    syscall(NR.mount_setattr, tree, b"\0", 0x1000, attributes, 32)
    syscall(NR.move_mount, tree, b"\0", -100, os.fsencode(place / point), 4)
    os.close(tree)
    os.close(users)


@pytest.mark.parametrize(
    ("outside", "seen"),
    [
        (None, (100_007, 100_008)),
        (IdMap([Extent(0, 0, 1), Extent(100_000, 700_000, 65_536)]), (700_007, 700_008)),
    ],
    ids=["same", "rebased"],
)
def test_an_idmapped_mount_shows_ids_where_those_of_the_tree_lie(
    outside: IdMap | None, seen: tuple[int, int], place: Path
) -> None:
    os.chown(place / "a", 7, 8)

    def whole() -> None:
        begin()
        bind_idmapped(place, mapped, "a", "b")

    with held(lambda: None, MAPS[1]) as mapped, held(whole) as pid:
        shown = os.stat(f"/proc/{pid}/root{place}/b")
        assert (shown.st_uid, shown.st_gid) == (100_007, 100_008)
        capture, forest = captured(pid)
        assert not capture.blockers
        record = own_namespace(capture, "mnt")
        if outside is not None:
            forest = Forest(forest.namespaces.values(), {"uid": outside, "gid": outside})
        with making(forest, {record.index: record}) as keepers:
            again = other_keepers(keepers)[record.index].pid
            assert looks(again) == looks(pid)
            shown = os.stat(f"/proc/{again}/root{place}/b")
            assert (shown.st_uid, shown.st_gid) == seen


def test_an_idmapped_mount_whose_ids_have_no_place_is_named(place: Path) -> None:
    def whole() -> None:
        begin()
        bind_idmapped(place, mapped, "a", "b")

    with held(lambda: None, MAPS[1]) as mapped, held(whole) as pid:
        capture, forest = captured(pid)
        record = own_namespace(capture, "mnt")
        few = IdMap([Extent(0, 0, 110_000)])
        forest = Forest(forest.namespaces.values(), {"uid": few, "gid": few})
        with (
            pytest.raises(RebuildError, match=f"idmapped mount {place}/b .* shows have no place here"),
            making(forest, {record.index: record}),
        ):
            pass


def test_a_file_system_that_is_idmapped_as_a_whole_is_refused(place: Path) -> None:
    """What it holds could not be read as it is."""

    def whole() -> None:
        begin()
        empty_tmpfs(os.fsencode(place))
        bind_idmapped(place, mapped, "a", "b")
        syscall(NR.umount2, os.fsencode(place / "a"), 2)

    with held(lambda: None, MAPS[1]) as mapped, held(whole) as pid:
        assert "/b (tmpfs) is idmapped, and of a file system that is not to be seen as it is" in refused(pid)


# -- propagation, seen from a namespace whose mounts are shared ----------------------------


def in_shared_mounts(body: Callable[[], None]) -> None:
    """Run `body` in a child whose mounts are all shared, as they are on most hosts."""

    def shared() -> None:
        unshare(CLONE.NEWNS)
        mount(None, b"/", None, REC | SHARED)
        body()

    in_child(shared)


@pytest.mark.parametrize("id_map", MAPS[:2])
@pytest.mark.parametrize("flag", [PRIVATE, SLAVE, None], ids=["private", "slave", "as it was"])
def test_propagation_of_a_whole_namespace(flag: int | None, id_map: str | None, place: Path) -> None:
    def whole() -> None:
        unshare(CLONE.NEWNS)
        if flag is not None:
            mount(None, b"/", None, REC | flag)
            mount(b"own", os.fsencode(place / "a"), b"tmpfs", 0)

    def body() -> None:
        with held(whole, id_map) as pid, made_again(pid, "mnt") as (record, again):
            assert looks(again) == looks(pid)
            linked = [(m.shared, m.master) for m in mountinfo(pid) if m.point != os.fsencode(place / "a")]
            assert [
                (m.shared, m.master) for m in mountinfo(again) if m.point != os.fsencode(place / "a")
            ] == linked
            assert own_namespace(captured(again)[0], "mnt").state == record.state

    in_shared_mounts(body)


@pytest.mark.parametrize("id_map", MAPS[:2])
def test_mixed_propagation(id_map: str | None, place: Path) -> None:
    def whole() -> None:
        unshare(CLONE.NEWNS)
        mount(None, b"/", None, REC | SLAVE)
        mount(None, b"/sys", None, PRIVATE)
        mount(None, b"/proc", None, PRIVATE)
        mount(None, b"/proc", None, SHARED)
        mount(b"/sys", os.fsencode(place / "a"), None, BIND | REC)
        mount(b"/proc", os.fsencode(place / "b"), None, BIND | REC)

    def body() -> None:
        with held(whole, id_map) as pid, made_again(pid, "mnt") as (record, again):
            assert looks(again) == looks(pid)
            assert groups(again) == groups(pid)
            assert own_namespace(captured(again)[0], "mnt").state == record.state

    in_shared_mounts(body)


def test_a_tmpfs_of_two_namespaces_is_one_again(place: Path) -> None:
    """A copy that a user namespace of its own owns; then the original mounts more, so that it is no base for it."""
    point = place / "a"

    def whole() -> None:
        begin()
        mount(b"both", os.fsencode(point), b"tmpfs", 0)
        (point / "file").write_text("of both")
        reader, writer = os.pipe()
        if os.fork() == 0:
            prctl(PRCTL.SET_PDEATHSIG, signal.SIGKILL)
            unshare(CLONE.NEWUSER | CLONE.NEWNS)
            prctl(PRCTL.SET_DUMPABLE, 1)
            os.write(writer, b"x")
            while True:
                signal.pause()
        os.read(reader, 1)
        mount(b"more", os.fsencode(place / "b"), b"tmpfs", 0)

    def content_of(space: int) -> LocalFd:
        return contents[space]

    with held(whole) as first:
        second = HostPid(int(Path(f"/proc/{first}/task/{first}/children").read_text()))
        capture, forest = captured(first, second)
        assert not capture.blockers, capture.blockers
        contents: dict[int, LocalFd] = {}

        def register(fd: LocalFd, size_bytes: int) -> int:
            contents[len(contents) + 1] = LocalFd(os.dup(fd))
            return len(contents)

        capture.take_contents(register)
        records = {n.index: n for n in capture.namespaces if n.kind == "mnt" and not n.external}
        with making(forest, records, content_of) as keepers:
            again = [other_keepers(keepers)[index].pid for index in records]
            assert [looks(pid) for pid in again] == [looks(pid) for pid in (first, second)]
            shown = [os.stat(f"/proc/{pid}/root{point}/file") for pid in again]
            assert os.path.samestat(*shown)
            assert Path(f"/proc/{again[1]}/root{point}/file").read_text() == "of both"
        for fd in contents.values():
            os.close(fd)
