"""A child that is forked beside threads: no handler of a signal runs in it."""

from __future__ import annotations

import subprocess
import sys

from tests.harness.tree import ROOT

#: a signal comes right behind the fork, in the child; its handler waits for what another thread holds
_PROGRAM = """
import os, signal, sys, threading
from pipeline.kernel.forking import fork_deaf

held = threading.Lock()
held.acquire()
signal.signal(signal.SIGWINCH, lambda *_: held.acquire())
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGWINCH))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
child = (fork_deaf if sys.argv[1] == "deaf" else os.fork)()
if child == 0:
    os._exit(7)
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
threading.Timer(1, os.kill, (child, signal.SIGKILL)).start()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


def outcome(how: str) -> str:
    command = [sys.executable, "-c", _PROGRAM, how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.strip()


def test_the_child_hears_nothing_and_the_parent_what_it_heard_before() -> None:
    assert outcome("deaf") == "7"


def test_any_other_child_would_wait_for_ever() -> None:
    assert outcome("as ever") == "-9"
