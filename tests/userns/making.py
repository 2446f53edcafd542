"""Namespaces for tests: made again by keepers, or held open by a child that made them itself."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.ids import HostPid, LocalFd, RemoteAddress
from pipeline.image.schema import Namespace
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl, unshare
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet, spawn_launcher
from pipeline.resources.namespaces.keepers import Keepers
from pipeline.resources.namespaces.members import NamespaceCapture
from pipeline.userns.capture import LiveForest
from pipeline.userns.cradle import is_privileged
from pipeline.userns.externals import GivenDevice
from pipeline.userns.forest import Forest
from pipeline.userns.lodgers import Lodgers

_SCRATCH = RemoteAddress(0x2000_0000_0000)


def _no_content(space: int) -> LocalFd:
    raise AssertionError(f"space {space} is wanted, and this test has no contents")


@contextmanager
def making(
    forest: Forest,
    namespaces: Mapping[int, Namespace] | None = None,
    contents: Callable[[int], LocalFd] = _no_content,
    given: Sequence[GivenDevice] = (),
) -> Iterator[Keepers]:
    """The keepers of these namespaces; nothing of them is left after the block."""
    with ExitStack() as claims:
        launcher = spawn_launcher(_SCRATCH, 900)
        claims.callback(launcher.stage.channel.close)
        claims.callback(launcher.kill_and_reap)
        keepers = Keepers(launcher, forest, claims, given=given)
        keepers.make(namespaces or {})
        keepers.furnish(contents)
        keepers.settle()
        yield keepers
    assert not LEDGER.held()


def user_pids(keepers: Keepers) -> dict[int, HostPid]:
    """Who keeps which user namespace."""
    return {index: puppet.pid for index, puppet in keepers.seats.user.items() if index}


def other_keepers(keepers: Keepers) -> dict[int, Puppet]:
    """Who keeps which other namespace."""
    return keepers.seats.other


@contextmanager
def held(act: Callable[[], object], id_map: str | None = None) -> Iterator[HostPid]:
    """A child that has run `act` and waits; with `id_map` it is first moved into a user namespace with that map."""
    from_child, to_parent = os.pipe()
    from_parent, to_child = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(from_child)
            os.close(to_child)
            if id_map is not None:
                unshare(CLONE.NEWUSER)
                prctl(PRCTL.SET_DUMPABLE, 1)
                os.write(to_parent, b"m")
                os.read(from_parent, 1)
                first = int(id_map.split()[0])
                os.setresgid(first, first, first)
                os.setresuid(first, first, first)
                prctl(PRCTL.SET_DUMPABLE, 1)
            act()
            os.write(to_parent, b"r")
            while True:
                signal.pause()
        except OSError as error:
            os.write(to_parent, f"e{error}".encode())
        finally:
            os._exit(1)
    os.close(to_parent)
    os.close(from_parent)
    try:
        if id_map is not None:
            assert os.read(from_child, 1) == b"m"
            if os.geteuid() != 0:
                Path(f"/proc/{pid}/setgroups").write_text("deny")
            for name in ("gid_map", "uid_map"):
                Path(f"/proc/{pid}/{name}").write_text(id_map)
            os.write(to_child, b"g")
        said = os.read(from_child, 200)
        assert said == b"r", said
        yield HostPid(pid)
    finally:
        os.close(from_child)
        os.close(to_child)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def captured(*pids: HostPid, lodgers: Lodgers | None = None) -> tuple[NamespaceCapture, Forest]:
    """The namespaces of these processes, captured as this process may."""
    live = LiveForest()
    capture = NamespaceCapture(pids, live, is_privileged(), lodgers or Lodgers())
    return capture, live.forest()


def own_namespace(capture: NamespaceCapture, kind: str) -> Namespace:
    """The one namespace of a kind that is not external."""
    (found,) = [n for n in capture.namespaces if n.kind == kind and not n.external]
    return found


@contextmanager
def made_again(pid: HostPid, kind: str) -> Iterator[tuple[Namespace, HostPid]]:
    """Capture the namespace of `kind` that `pid` has for itself; its record, and a process in a new one like it."""
    capture, forest = captured(pid)
    assert not capture.blockers, capture.blockers
    record = own_namespace(capture, kind)
    with making(forest, {record.index: record}) as keepers:
        yield record, other_keepers(keepers)[record.index].pid


def refused(pid: HostPid) -> str:
    """The one reason why the namespaces of `pid` are not carried."""
    capture, _ = captured(pid)
    (blocker,) = capture.blockers
    assert blocker.subject == f"pid {pid}"
    return str(blocker)


def in_child(body: Callable[[], None]) -> None:
    """Run `body` in a child; what it raises is printed there, and fails the test."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:  # noqa: BLE001 - seen by the exit code
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
