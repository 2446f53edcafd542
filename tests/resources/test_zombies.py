"""How a process that nobody has collected has ended, as far as it cannot be carried, is said."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import blocking
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from tests.harness.tree import PATIENCE_S

pytestmark = pytest.mark.root

_DUMPS_CORE = """
import os, resource, signal, time
resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
child = os.fork()
if child == 0:
    os.abort()
ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
print(child if ended.si_code == os.CLD_DUMPED else 0, flush=True)
time.sleep(1000)
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[tuple[int, HostPid]]:
    """A process, and its child that has left a core dump."""
    said = tmp_path / "said"
    with said.open("wb") as out:
        parent = subprocess.Popen(
            [sys.executable, "-c", _DUMPS_CORE],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    with parent:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not said.read_text() and time.monotonic() < deadline:
                time.sleep(0.01)
            child = HostPid(int(said.read_text()))
            if not child:
                pytest.skip("this host leaves no core dumps (core_pattern)")
            yield parent.pid, child
        finally:
            parent.kill()


def test_a_core_dump_is_not_left_again(tree: tuple[int, HostPid], tmp_path: Path) -> None:
    parent, child = tree
    image = tmp_path / "image"
    blocking.dump(parent, str(image), leave="end")
    cores = sorted(tmp_path.glob("core*"))
    restored = blocking.restore(str(image), detach=True, new_pidns=True)
    try:
        (note,) = (note for note in restored.notes if "core dump" in note)
        assert note.startswith(
            f"pid {child}: has ended with wait status {signal.SIGABRT | 0x80:#x}, and has 0x6 now"
        )
        (again,) = procfs.children(HostPid(restored.root_pid))
        assert procfs.stat(again).exit_code == signal.SIGABRT
        assert sorted(tmp_path.glob("core*")) == cores
    finally:
        restored.send_signal(signal.SIGKILL)
        restored.wait()
        restored.close()
