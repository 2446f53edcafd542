"""Runs the tests: ``python -m tests [what pytest takes]``.

As root on a machine with several processors they run side by side, each worker in a pid namespace of its own, so
that trees do not take each other's pids. Elsewhere, and where something is to be debugged (``--pdb``, ``-s``), asked
(``--collect-only``, ``--help``) or decided otherwise (``-n``, ``-p no:xdist``), it is pytest as it is.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

WORKER = Path(__file__).parent / "harness" / "worker.sh"
#: what pytest does in one process only, or is told about its workers; options of one letter may be put together: -xvs
_AS_IT_IS = re.compile(
    r"-[lqvx]*[hns].*|(-p)?no:xdist|--(capture|co|collect-only|dist|fixtures|fixtures-per-test|help|numprocesses"
    r"|pdb|setup-only|setup-plan|trace|tx)(=.*)?"
)


def workers() -> int:
    """How many run side by side; 0 where they cannot. One more than processors: a quarter of it is waiting."""
    if os.geteuid() != 0:
        return 0
    count = min(len(os.sched_getaffinity(0)) + 1, 4)
    can = subprocess.run([WORKER, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return count if count > 1 and can.returncode == 0 else 0


def as_it_is(arguments: Sequence[str]) -> bool:
    """Whether these arguments of pytest want it in this process, or say themselves how it is spread."""
    return any(map(_AS_IT_IS.fullmatch, arguments))


def main() -> None:
    """Become pytest."""
    arguments = sys.argv[1:]
    if not as_it_is(arguments) and (count := workers()):
        python = shlex.join([str(WORKER), sys.executable])
        arguments = [f"--tx={count}*popen//python={python}", "--dist=worksteal", *arguments]
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])


if __name__ == "__main__":
    main()
