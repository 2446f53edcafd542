"""A refused system call at any step of making namespaces: nothing is left, and everything is given back once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.errors import RebuildError
from pipeline.image.schema import Extent, Id, Namespace, UserNamespace
from pipeline.kernel.syscalls import CLONE, mount, unshare
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.userns import visit
from pipeline.userns.forest import Forest
from tests.harness.tree import children_of
from tests.userns.making import captured, held, making

pytestmark = pytest.mark.root

FOREST = Forest(
    [
        UserNamespace(index=0),
        UserNamespace(
            index=1,
            parent=0,
            owner=Id(0, 0),
            uid_map=[Extent(0, 100_000, 65_536)],
            gid_map=[Extent(0, 100_000, 65_536)],
        ),
        UserNamespace(
            index=2, parent=1, owner=Id(1, 7), uid_map=[Extent(0, 7, 1)], gid_map=[Extent(0, 7, 1)], setgroups="deny"
        ),
    ]
)  # fmt: skip


def namespaces_of_a_container() -> dict[int, Namespace]:
    """uts, ipc and mnt namespaces with something in each, as captured; owned by namespace 2 of `FOREST`."""

    def act() -> None:
        unshare(CLONE.NEWNS | CLONE.NEWUTS | CLONE.NEWIPC)
        mount(None, b"/", None, 0x44000)
        mount(b"own", b"/srv", b"tmpfs", 0)
        mount(b"mqueue", b"/mnt", b"mqueue", 0)
        mount(b"/proc/self/ns/uts", b"/etc/passwd", None, 0x1000)
        Path("/proc/sys/kernel/msgmax").write_text("4096")

    with held(act, "0 100000 65536") as pid:
        capture, _ = captured(pid)
    assert not capture.blockers
    return {n.index: n for n in capture.namespaces if not n.external}


class Failing:
    """Counts tables of calls run in puppets, and visits to namespaces, and fails one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None) -> None:
        self.count = 0
        self._at = at
        run = Puppet.run

        def failing(puppet: Puppet, calls: Sequence[Call]) -> None:
            if puppet.stage.calls:  # the launcher's own beginnings are another test's
                self._step()
            run(puppet, calls)

        monkeypatch.setattr(Puppet, "run", failing)
        for name in ("_by_thread", "_by_child"):
            monkeypatch.setattr(visit, name, self._counted(getattr(visit, name)))

    def _step(self) -> None:
        self.count += 1
        if self.count == self._at:
            raise OSError(errno.EPERM, "refused by the test")

    def _counted(self, visitor: Callable[..., bytes]) -> Callable[..., bytes]:
        def counted(*args: object) -> bytes:
            self._step()
            return visitor(*args)

        return counted


def test_every_step_may_fail() -> None:
    namespaces, before = namespaces_of_a_container(), children_of(os.getpid())
    with pytest.MonkeyPatch.context() as patch:
        steps = Failing(patch, None)
        with making(FOREST, namespaces):
            pass
    assert steps.count > 40
    for at in range(1, steps.count + 1):
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, at)
            with (
                pytest.raises((RebuildError, OSError), match="refused by the test"),
                making(FOREST, namespaces),
            ):
                pass
            assert failing.count >= at
        assert not LEDGER.held()
        assert children_of(os.getpid()) == before


def test_keepers_end_when_the_tree_has_moved_in() -> None:
    with making(FOREST) as keepers:
        pids = [puppet.pid for puppet in keepers.seats.user.values()]
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
