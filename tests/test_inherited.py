"""Whoever starts a command hands things on to it: they neither hinder it nor come into the tree that it restores."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

import pipeline
from pipeline.errors import UsageError
from tests.harness.carry import assert_same, unharmed
from tests.harness.settings import DEPTH_0, DEPTH_1, DEPTH_2, Setting
from tests.harness.snapshot import take
from tests.harness.tree import ROOT, Tree, dump, engine, reap, restore, said

pytestmark = pytest.mark.root

#: what is done before the command is executed, in Python
STARTERS = {
    "sigchld": "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "signals": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); signal.signal(signal.SIGPIPE, signal.SIG_IGN)",
    "closed": "os.closerange(0, 3)",
    "no_stderr": "os.close(2)",
    "huge_pages_off": "libc.prctl(41, 1, 0, 0, 0)",
    "merging": "libc.prctl(67, 1, 0, 0, 0)",
    "scheduling": "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)); os.nice(5); "
    "os.sched_setaffinity(0, {0})",
    "settings": "libc.personality(0x0040000); os.umask(0o777); libc.prctl(29, 123456, 0, 0, 0); "
    "open('/proc/self/oom_score_adj', 'w').write('777'); open('/proc/self/coredump_filter', 'w').write('1')",
}
NO_NEW_PRIVILEGES = "libc.prctl(38, 1, 0, 0, 0)"
NO_EXECUTABLE_MEMORY = "libc.prctl(65, 1, 0, 0, 0)"
#: a filter that allows all
FILTERED = (
    "allow = ctypes.create_string_buffer(struct.pack('<HBBI', 6, 0, 0, 0x7FFF0000)); "
    "program = struct.pack('<HxxxxxxQ', 1, ctypes.addressof(allow)); libc.syscall(317, 1, 0, program)"
)


def starter(what: str) -> list[str]:
    """A command that does so, and then executes the words behind it."""
    script = "import ctypes, os, signal, struct, sys; libc = ctypes.CDLL(None)\n"
    return [sys.executable, "-c", f"{script}{what}\nos.execv(sys.argv[1], sys.argv[1:])"]


@pytest.mark.parametrize("what", list(STARTERS))
def test_a_tree_is_carried_by_whom_anybody_starts(
    start: Callable[..., Tree], tmp_path: Path, what: str
) -> None:
    # /proc says of a zombie, too, where it might run, and nobody gives that back
    tree = start("threads" if what == "scheduling" else "processes", DEPTH_1)
    within = starter(STARTERS[what])
    with unharmed(tree):
        family = tree.pids()
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", within=within)
        assert done.returncode == 0, said(done)
        assert not reap(family)
        done = engine("restore", "--from", tmp_path / "image", "--detach", within=within)
        assert done.returncode == 0, said(done)


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1, DEPTH_2], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("what", "reason"),
    [(NO_NEW_PRIVILEGES, "no_new_privs"), (NO_EXECUTABLE_MEMORY, "PR_SET_MDWE")],
    ids=["no_new_privs", "mdwe"],
)
def test_what_nobody_can_take_back_is_refused(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting, what: str, reason: str
) -> None:
    if what == NO_EXECUTABLE_MEMORY and ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:
        pytest.skip("this kernel has no PR_SET_MDWE")
    tree = start("quiet", setting)
    before = take(tree.pids())
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", within=starter(what))
    assert done.returncode == 3, said(done)
    assert reason in done.stderr
    assert "of systemd" in done.stderr
    restore(tree, tmp_path / "image")
    assert_same(before, take(tree.pids()))
    tree.check()


def test_a_restorer_under_a_filter_says_so(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet", DEPTH_1)
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--json", within=starter(FILTERED))
    assert done.returncode == 0, said(done)
    assert "it is under 1 seccomp filter of the restorer, too" in json.loads(done.stdout)["notes"]
    tree.check()


@pytest.mark.parametrize("closing", ["--to - >&-", "--to - --leave-running >&-"])
def test_an_image_goes_to_no_closed_descriptor(start: Callable[..., Tree], closing: str) -> None:
    tree = start("quiet", DEPTH_1)
    command = f"{sys.executable} -m pipeline dump --pid {tree.pid} {closing}"
    done = subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "dump: --to - writes the image to stdout, which is closed\n")
    tree.check()


def test_no_image_comes_from_a_closed_descriptor() -> None:
    command = f"{sys.executable} -m pipeline restore --from - <&-"
    done = subprocess.run(["/bin/sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "restore: --from - reads the image from stdin, which is closed\n",
    )


def test_a_program_that_ignores_its_children_is_told_so(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("quiet", DEPTH_1)

    async def recipe() -> None:
        await pipeline.dump(tree.pid, str(tmp_path / "image"))

    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(UsageError, match="ignores SIGCHLD"):
            trio.run(recipe)
    finally:
        signal.signal(signal.SIGCHLD, before)
    tree.check()
