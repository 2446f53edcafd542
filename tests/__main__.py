"""Runs the tests: ``python -m tests [what pytest takes]``.

As root on a machine with several processors they run side by side, each worker in a pid namespace of its own, so
that trees do not take each other's pids. Elsewhere, and where something is to be debugged (``--pdb``, ``-s``) or
asked for otherwise (``-n``, ``--tx``), it is pytest as it is.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

WORKER = Path(__file__).parent / "harness" / "worker.sh"
_AS_IT_IS = ("--pdb", "-s", "--capture=no", "-n", "--tx", "-p", "--collect-only", "--co", "-h", "--help")


def workers() -> int:
    """How many run side by side; 0 where they cannot."""
    if os.geteuid() != 0:
        return 0
    count = min(len(os.sched_getaffinity(0)), 4)
    can = subprocess.run([WORKER, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return count if count > 1 and can.returncode == 0 else 0


def main() -> None:
    """Become pytest."""
    arguments = sys.argv[1:]
    if not any(word.split("=")[0] in _AS_IT_IS for word in arguments) and (count := workers()):
        python = shlex.join([str(WORKER), sys.executable])
        arguments = [f"--tx={count}*popen//python={python}", "--dist=worksteal", *arguments]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    main()
