"""Trees that are moved and disturbed: `python -m tests.disturbed --times 100 [--mode hybrid] [--seed 7]`, as root.

Dice choose what is moved, what disturbs it and when (`tests/harness/disturbing.py`). The first tree that is not in
exactly one place, or not as it was, and the first process that is left behind end it.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.harness.disturbing import Journey
from tests.harness.hosts import Host, two_hosts, write_secret
from tests.harness.settings import CONTAINER_2, DEPTH_2, Setting
from tests.harness.tree import Workshop
from tests.soak import MODES

#: what is moved, where, and its arguments; nothing of which a machine can have only one
PROGRAMS: dict[str, tuple[Setting, Sequence[str]]] = {
    "rewriting": (DEPTH_2, ("forks",)),
    "processes": (DEPTH_2, ()),
    "threads": (DEPTH_2, ()),
    "files": (DEPTH_2, ()),
    "echoing": (DEPTH_2, ()),
    "networks": (DEPTH_2, ()),
    "mounted": (CONTAINER_2, ()),
    "sharing": (CONTAINER_2, ()),
    "sysv": (CONTAINER_2, ()),
}
#: so often one program, unless it is lost
_TIMES_ONE = 10
_TOLD_EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.disturbed", description=__doc__)
    parser.add_argument("--times", type=int, default=100, help="migrations in each mode")
    parser.add_argument("--mode", choices=MODES, action="append", help="all, if none is given")
    parser.add_argument("--seed", type=int, default=0, help="what the dice begin with")
    arguments = parser.parse_args()
    workshop = Workshop()
    with ExitStack() as stack:
        stack.callback(workshop.remove)
        hosts = stack.enter_context(two_hosts())
        secret = write_secret(workshop.path / "secret")
        for mode in arguments.mode or MODES:
            dice = random.Random(f"{arguments.seed} {mode}")
            seen: Counter[str] = Counter()
            while (done := seen.total()) < arguments.times:
                seen += _travel(hosts, workshop, secret, mode, min(_TIMES_ONE, arguments.times - done), dice)
                if seen.total() // _TOLD_EVERY > done // _TOLD_EVERY or seen.total() == arguments.times:
                    print(f"{mode}: {seen.total()} disturbed migrations: {dict(seen)}", flush=True)


def _travel(
    hosts: tuple[Host, Host], workshop: Workshop, secret: Path, mode: str, times: int, dice: random.Random
) -> Counter[str]:
    """What becomes of one program, so often or until it is lost."""
    program = dice.choice(list(PROGRAMS))
    tree = hosts[0].start(workshop, program, PROGRAMS[program][0], 5000, PROGRAMS[program][1])
    seen: Counter[str] = Counter()
    try:
        journey = Journey(*hosts, tree, secret, mode)
        journey.go()
        while seen.total() < times and not seen["lost"]:
            seen[journey.disturb(dice)] += 1
    except AssertionError as error:
        error.add_note(f"the program was {program}")
        raise
    finally:
        tree.kill()
    return seen


if __name__ == "__main__":
    main()
