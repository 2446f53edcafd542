"""A program that never rests, moved again and again: `python -m tests.soak --times 200 [--mode hybrid]`, as root.

tests/programs/rewriting.c writes, drops, moves, unmaps and maps memory in many threads, forks, and knows what has to be
in every page. It is moved there and back between two hosts on this machine; the first wrong page, or migration that
fails, ends it.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack

from tests.harness.hosts import migrate, two_hosts, write_secret
from tests.harness.settings import DEPTH_2
from tests.harness.tree import Workshop

MODES = ("stop", "precopy", "postcopy", "hybrid")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--times", type=int, default=200, help="migrations in each mode")
    parser.add_argument("--mode", choices=MODES, action="append", help="all, if none is given")
    parser.add_argument(
        "--huge", action="store_true", help="most of its memory consists of huge pages of hugetlbfs"
    )
    arguments = parser.parse_args()
    options = ("forks", "huge") if arguments.huge else ("forks",)
    workshop = Workshop()
    with ExitStack() as stack:
        stack.callback(workshop.remove)
        source, destination = stack.enter_context(two_hosts())
        secret = write_secret(workshop.path / "secret")
        for mode in arguments.mode or MODES:
            tree = source.start(workshop, "rewriting", DEPTH_2, 5000, options)
            try:
                begin, longest_ms = time.monotonic(), 0.0
                for number in range(1, arguments.times + 1):
                    result = migrate(source, destination, tree, secret, "--mode", mode, compare=False)
                    tree.check()
                    source, destination = destination, source
                    longest_ms = max(longest_ms, result["figures"]["downtime"])
                    if number % 20 == 0 or number == arguments.times:
                        seconds = time.monotonic() - begin
                        print(
                            f"{mode}: {number} migrations, every page right; {seconds:.0f} s, "
                            f"longest downtime {longest_ms:.0f} ms",
                            flush=True,
                        )
            finally:
                tree.kill()


if __name__ == "__main__":
    main()
