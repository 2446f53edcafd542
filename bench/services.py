"""Real programs under load, moved between two hosts: the longest gap of their clients, and what these found wrong.

The programs and their loads are those of tests/programs/real.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.commands import longest_gap_ms
from bench.extent import Extent
from bench.matrix import Case, Sample
from pipeline import events
from tests.harness.hosts import write_secret
from tests.harness.networks import bridged_network, within
from tests.harness.settings import CLONE_NEWNET, DEPTH_1
from tests.harness.tree import Workshop, find_python
from tests.programs.real import postgres, servers
from tests.programs.real.tree import RealTree, Stage, find, launching, lines_of, made_stage

#: how long a load works before its program is moved, and afterwards
_SETTLE_S = 1.0
#: steps of a load that show that it works
_STEPS = 3
#: of the pause, and what `migrate` calls them
_PARTS = {
    "freeze": "freeze", "collect": "collect", "last-pages": "transfer", "finish": "finish", "thaw": "thaw",
}  # fmt: skip


def cases(extent: Extent) -> list[Case]:
    """Every program by every mode."""
    programs: list[tuple[str, Callable[[str, Path], Sample], str | None]] = [
        *((_name(idle), partial(_redis, idle), _missing("redis-server")) for idle in extent.idle),
        (
            "PostgreSQL, pgbench in the tree",
            _postgres,
            None if postgres.BIN.exists() else "no PostgreSQL here",
        ),
        ("Python service", _python, None),
    ]
    return [
        Case("services", f"{name}, {mode}", partial(measure, mode), {"program": name, "mode": mode}, missing)
        for name, measure, missing in programs
        for mode in extent.services
    ]


def _name(idle: int) -> str:
    return "Redis, 50 clients outside" + (f" and {idle} idle connections" if idle else "")


def _missing(command: str) -> str | None:
    return None if find(command) else f"no {command} here"


@contextmanager
def _stage() -> Iterator[tuple[Stage, Callable[..., RealTree]]]:
    with ExitStack() as stack:
        workshop = Workshop()
        stack.callback(workshop.remove)
        stage = stack.enter_context(made_stage(workshop, write_secret(workshop.path / "secret")))
        yield stage, stack.enter_context(launching(stage))


def _moved(
    tree: RealTree, mode: str, gap_ms: Callable[[float], float], move: Callable[[], object]
) -> dict[str, float]:
    """Figures of one migration; `gap_ms`: the longest gap of the clients since a time of day."""
    log = tree.directory / "events"
    tree.dumping = ["--mode", mode, "--events", str(log)]
    begin = time.time()
    time.sleep(_SETTLE_S)
    before = gap_ms(begin)
    since = time.time()
    move()
    time.sleep(_SETTLE_S)
    tree.goes_on(_STEPS)
    last = events.parse(log.read_bytes().splitlines()[-1])
    assert isinstance(last, events.Completed)
    return {
        "gap-ms": gap_ms(since),
        "gap-before-ms": before,
        "downtime-ms": last.figures["downtime"],
        **{f"{part}-ms": last.figures[f"{name}-time"] for part, name in _PARTS.items()},
        "total-ms": last.figures["total-time"],
        "sent-bytes": last.figures["transferred"],
    }


def _redis(idle: int, mode: str, _: Path) -> Sample:
    setting = DEPTH_1.with_kinds("depth1", CLONE_NEWNET)
    with bridged_network() as around, _stage() as (stage, launch):
        with servers.redis_and_clients(launch, stage.workshop, around, setting) as (tree, clients):
            tree.restoring = ["--external", "veth:eth0=out2@br0"]
            gaps = tree.directory / "gaps"
            with servers.idle_connections(around, tree, idle):
                figures = _moved(
                    tree,
                    mode,
                    partial(longest_gap_ms, gaps),
                    lambda: within(around, tree.migrate),
                )
            clients.terminate()
            checks = {"clients ended well": clients.wait(60) == 0}
            servers.all_is_well(tree.directory)
            checks["no answer was wrong, no write lost, no connection ended"] = True
            tree.finish()
    return Sample(figures, checks)


def _postgres(mode: str, _: Path) -> Sample:
    with _stage() as (stage, launch):
        cluster = postgres.new_cluster(stage.workshop)
        tree = postgres.start_postgres(launch, stage.workshop, cluster, postgres.DEPTH_1)
        tree.goes_on(_STEPS)
        figures = _moved(tree, mode, partial(_slowest_ms, tree.directory), tree.migrate)
        postgres.adds_up(tree)
        tree.finish(signal.SIGTERM)
        checks = {
            "no transaction is lost or done twice": True,
            "no client was aborted": "aborted" not in tree.log(),
            "the server did not panic": "PANIC" not in tree.log(),
        }
    return Sample(figures, checks)


def _slowest_ms(directory: Path, since: float) -> float:
    """The longest transaction that ended since a time of day, by the logs of pgbench.

    Its lines: client, transaction, microseconds, script, and when it ended as seconds and microseconds.
    """
    found = [0.0]
    for path in directory.glob("load.[0-9]*"):
        for line in path.read_text().splitlines():
            words = line.split()
            if len(words) >= 6 and int(words[4]) + int(words[5]) / 1e6 >= since:
                found.append(int(words[2]) / 1e3)
    return max(found)


def _python(mode: str, _: Path) -> Sample:
    with _stage() as (_, launch):
        command = [find_python(), "busy.py", "forkserver"]
        tree = launch(DEPTH_1, command, lines_of("counts"), sources=["busy.py"])
        tree.goes_on(_STEPS)
        figures = _moved(tree, mode, partial(longest_gap_ms, tree.directory / "gaps"), tree.migrate)
        tree.finish()
        checks = {
            "it found nothing wrong": not (tree.directory / "wrong").exists(),
            "its database is whole": (tree.directory / "ended").exists(),
        }
    return Sample(figures, checks)
