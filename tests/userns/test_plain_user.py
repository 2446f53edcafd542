"""A user without any capability: namespaces are captured from outside, and made again in a cradle."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline.errors import RebuildError, Refused
from pipeline.ids import HostPid
from pipeline.image.schema import Extent, Id, UserNamespace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, PRCTL, mount, prctl, syscall, unshare
from pipeline.resources.namespaces.members import check_visible
from pipeline.restore import RestoredTree
from pipeline.userns import cradle
from pipeline.userns.forest import Forest
from tests.harness.settings import Level, Setting
from tests.harness.tree import Tree, dump
from tests.userns.making import captured, held, in_child, making, other_keepers, own_namespace

pytestmark = pytest.mark.root

USER = 61_234


def as_plain_user(body: Callable[[], None]) -> None:
    def plain() -> None:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
        prctl(PRCTL.SET_DUMPABLE, 1)
        assert not cradle.is_privileged()
        body()

    in_child(plain)


def container() -> None:
    unshare(CLONE.NEWUTS | CLONE.NEWIPC | CLONE.NEWNS | CLONE.NEWNET)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    syscall(NR.sethostname, b"plain", 5)
    Path("/proc/sys/kernel/msgmax").write_text("4096")
    mount(None, b"/", None, 0x44000)
    mount(b"own", b"/srv", b"tmpfs", 0)


def test_namespaces_of_a_plain_user_are_made_again() -> None:
    def body() -> None:
        with held(container, f"0 {USER} 1") as pid:
            capture, forest = captured(pid)
            assert not capture.blockers, capture.blockers
            (inner,) = [n for n in forest.namespaces.values() if n.index]
            assert inner.uid_map == [Extent(0, USER, 1)]
            assert inner.gid_map == [Extent(0, USER, 1)]
            assert inner.owner == Id(0, USER)
            assert inner.setgroups == "deny"
            assert own_namespace(capture, "uts").state["hostname"] == b"plain"
            assert own_namespace(capture, "ipc").state["sysctls"] == {"kernel/msgmax": b"4096"}

            def restore() -> None:
                cradle.enter()
                own = [n for n in capture.namespaces if not n.external]
                with making(forest, {n.index: n for n in own}) as keepers:
                    for namespace in own:
                        pid = other_keepers(keepers)[namespace.index].pid
                        again, again_forest = captured(pid)
                        assert not again.blockers
                        assert again_forest.namespaces == forest.namespaces
                        assert own_namespace(again, namespace.kind).state == namespace.state

            in_child(restore)

    as_plain_user(body)


def test_nested_namespaces_of_one_id() -> None:
    def one(index: int, inner: int, lower: int) -> UserNamespace:
        extents = [Extent(inner, lower, 1)]
        return UserNamespace(
            index=index,
            parent=index - 1,
            owner=Id(index - 1, lower),
            uid_map=extents,
            gid_map=extents,
            setgroups="deny",
        )

    def body() -> None:
        cradle.enter()
        forest = Forest([UserNamespace(index=0), one(1, 0, USER), one(2, 1000, 0), one(3, 0, 1000)])
        with making(forest) as keepers:
            _, again = captured(keepers.seats.user[3].pid)
            assert again.namespaces == forest.namespaces

    as_plain_user(body)


def test_ids_that_the_user_does_not_have_are_refused() -> None:
    def body() -> None:
        cradle.enter()
        extents = [Extent(0, USER, 2)]
        wide = UserNamespace(
            index=1, parent=0, owner=Id(0, USER), uid_map=extents, gid_map=extents, setgroups="deny"
        )
        with (
            pytest.raises(RebuildError, match=r"_map `0 61234 2` is refused"),
            making(Forest([UserNamespace(index=0), wide])),
        ):
            pass

    as_plain_user(body)


def test_setgroups_allowed_cannot_be_had_in_a_cradle_of_one_id() -> None:
    def body() -> None:
        cradle.enter()
        extents = [Extent(0, USER, 1)]
        allowed = UserNamespace(index=1, parent=0, owner=Id(0, USER), uid_map=extents, gid_map=extents)
        with (
            pytest.raises(RebuildError, match="setgroups was allowed"),
            making(Forest([UserNamespace(index=0), allowed])),
        ):
            pass

    as_plain_user(body)


def test_a_process_that_may_not_be_looked_at_is_refused() -> None:
    def look(pid: HostPid, said: str) -> None:
        (blocker,) = check_visible(pid)
        assert blocker.subject == f"pid {pid}"
        assert said in blocker.reason

    def beside() -> None:
        with held(lambda: None, f"0 {USER} 1") as pid:
            assert not list(check_visible(pid))

            def look_from_beside() -> None:
                unshare(CLONE.NEWUSER)
                look(pid, "not below the pipeline's own")

            in_child(look_from_beside)

    as_plain_user(beside)
    with held(lambda: None) as of_root:
        as_plain_user(lambda: look(of_root, "another user"))


def test_a_tree_of_another_user_lies_on_the_own_id(start: Callable[..., Tree], tmp_path: Path) -> None:
    theirs = Setting("theirs", (Level(("7 1234 1",), ("8 2345 1",), "deny", 7, 8),), host_ids=(1234, 2345))
    tree = start("quiet", theirs)
    image = tree.directory / "image"
    dump(tree, image)
    for path in (*image.iterdir(), *tree.directory.iterdir()):
        path.chmod(0o777)

    async def attempt(placing: str) -> RestoredTree:
        return await pipeline.restore(str(image), detach=True, map=placing)

    def end(restored: RestoredTree) -> None:
        os.kill(restored.root_pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(trio.run(restored.wait)) in {-signal.SIGKILL, 128 + signal.SIGKILL}
        restored.close()

    # once as root, so that everything is imported: the user may not be able to read this interpreter
    end(trio.run(attempt, "same"))

    def body() -> None:
        cradle.enter()
        with pytest.raises(Refused, match="line `7 1234 1` of its uid_map has no place here"):
            trio.run(attempt, "same")
        restored = trio.run(attempt, "auto")
        try:
            status = Path(f"/proc/{restored.root_pid}/status").read_text().splitlines()
            assert [line.split()[1] for line in status if line.startswith(("Uid:", "Gid:"))] == [
                str(USER)
            ] * 2
            for name, line in (("uid_map", ["7", str(USER), "1"]), ("gid_map", ["8", str(USER), "1"])):
                assert Path(f"/proc/{restored.root_pid}/{name}").read_text().split() == line
        finally:
            end(restored)

    as_plain_user(body)
