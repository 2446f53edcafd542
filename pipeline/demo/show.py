"""The demo's story: stage, tree, move, both hosts before and after, the verdict and the figures."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline import amounts, run
from pipeline.cli import render
from pipeline.demo import verdict
from pipeline.demo.scene import ADDRESSES, SERVICE, Scene, available_ids, wait_until
from pipeline.errors import PipelineError
from pipeline.userns import cradle, permitted

if TYPE_CHECKING:
    from rich.console import Console

HOSTS = ("host-a", "host-b")
#: steps that the tree takes on the first host before it moves, and on the second before it is judged
STEPS = 100


def main(*, json: bool) -> int:
    """Run the demo; returns the exit code: 0 if everything held.

    Raises:
        PipelineError: the stage could not be built; nothing of it is left.
    """
    if not cradle.is_privileged():
        return _in_own_user_namespace()
    # SIGTERM takes the stage down like SIGINT does
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _play(json=json)
    except _Interrupted:
        return 143


class _Interrupted(BaseException):
    """SIGTERM."""


def _interrupt(_number: int, _frame: object) -> None:
    raise _Interrupted


def own_map() -> run.IdMap:
    """Own euid as 0, and the caller's range of /etc/subuid behind it where newuidmap can grant it."""
    own = run.Extent(0, os.geteuid(), 1)
    user = permitted.user_name()
    ranges = [
        permitted.subordinate_ranges(path, user, os.geteuid()) for path in ("/etc/subuid", "/etc/subgid")
    ]
    if permitted.has_tools() and all(ranges) and ranges[0][0] == ranges[1][0]:
        return (own, run.Extent(1, *ranges[0][0]))
    return (own,)


def _in_own_user_namespace() -> int:
    if os.environ.get("PIPELINE_DEMO_INSIDE"):
        raise PipelineError(
            "the demo needs CAP_SYS_ADMIN, and a user namespace of your own does not give it here"
        )
    extents = own_map()
    render.say("demo: as a plain user: the hosts are made inside a user namespace of your own")
    if len(extents) == 1:
        render.say(f"demo: with one id only; for more, {permitted.ask_for_ranges()}")
    waited = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*waited, signal.SIGCHLD))
    os.environ["PIPELINE_DEMO_INSIDE"] = "1"
    command = [sys.executable, "-m", "pipeline", *sys.argv[1:]]
    pid = run.start(command, run.Surroundings(users=[extents]), sorted(mask))
    code = os.waitstatus_to_exitcode(run.wait(pid, waited))
    return code if code >= 0 else 128 - code


def _play(*, json: bool) -> int:
    from rich.console import Console

    console = Console(stderr=json, highlight=False, soft_wrap=True)
    console.print("[bold]Building two hosts[/] on this machine, joined by a cable")
    with Scene() as scene:
        for name in HOSTS:
            console.print(f"  {name}: own network ({ADDRESSES[name]}), pid, mount, uts and ipc namespaces")
        count = available_ids()[1]
        console.print(
            f"  ids that this user namespace has: {count}; levels 1 and 2 map {', '.join(scene.maps)}"
        )
        wait_until(lambda: len(scene.log()) >= STEPS, "the tree does not count")
        before = scene.source.ask("tree", root=scene.root)
        console.print(f"\n[bold]Before:[/] the tree counts on host-a, a client on host-b asks {SERVICE}:8000")
        _table(console, before)
        console.print(f"\n[bold]Moving[/] pid {scene.root} from host-a to host-b, over TLS")
        code, moved, said = scene.migrate()
        if code:
            return _not_moved(console, scene, code, said)
        arrived = len(scene.log())
        wait_until(lambda: len(scene.log()) >= arrived + STEPS or _broken(scene), "the tree does not go on")
        time.sleep(0.5)
        after = scene.destination.ask("tree", root=scene.root)
        left = scene.source.ask("tree", root=scene.root)
        console.print("\n[bold]After:[/] the same tree on host-b")
        _table(console, after)
        seen = scene.end_client()
        log = scene.log()
    checks = [
        *verdict.same_tree(before, after),
        verdict.Check("nothing left on host-a", not left, ", ".join(str(p["pid"]) for p in left)),
        *verdict.counting(log, HOSTS),
        verdict.asked(seen),
    ]
    figures = dict(moved.get("figures", {}))
    pause = verdict.pause_s(log, HOSTS)
    if pause is not None:
        figures["pause seen by the tree"] = amounts.milliseconds(pause * 1000)
    _verdict(console, checks, figures)
    if json:
        render.document(
            {
                "ok": all(check.ok for check in checks),
                "checks": [check._asdict() for check in checks],
                "figures": figures,
                "client": seen,
                "before": verdict.topology(before),
                "after": verdict.topology(after),
            }
        )
    return 0 if all(check.ok for check in checks) else 1


def _broken(scene: Scene) -> bool:
    return any("fault" in line for line in scene.log()[-1:])


def _not_moved(console: Console, scene: Scene, code: int, said: str) -> int:
    console.print(f"[bold red]`migrate` ended with exit code {code}:[/]")
    console.print(said.rstrip(), markup=False)
    console.print("[bold]`serve` says:[/]")
    console.print(scene.text("serve.err").rstrip(), markup=False)
    steps = len(scene.log())
    time.sleep(0.3)
    goes_on = len(scene.log()) > steps
    console.print("the tree goes on on host-a" if goes_on else "[bold red]the tree stands still[/]")
    return code


def _table(console: Console, processes: Sequence[verdict.Process]) -> None:
    from rich.table import Table

    columns = ("pid", "inside", "program", "level", "uid", "inside", "uid map", "threads")
    table = Table(*columns, box=None, pad_edge=False)
    levels: dict[str, int] = {}
    for process in processes:
        uid = int(process["Uid"].split()[1])
        level = levels.setdefault(process["user namespace"], len(levels))
        table.add_row(
            str(process["pid"]),
            process["NSpid"].split()[-1],
            _program(process["command"]),
            str(level),
            str(uid),
            # at level 0 the host's ids are the process's own, and its map leads out of the host
            str(_inside(uid, process["uid_map"]) if level else uid),
            "every id" if process["uid_map"].endswith(" 4294967295") else process["uid_map"],
            process["Threads"],
        )
    console.print(table)


def _inside(uid: int, uid_map: str) -> int | str:
    """What the process calls a uid that the host calls `uid`."""
    numbers = [int(word) for word in uid_map.split()]
    for inner, outer, count in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
        if outer <= uid < outer + count:
            return inner + uid - outer
    return "unmapped"


def _program(command: Sequence[str]) -> str:
    if "http.server" in command:
        return "http.server"
    return command[2] if len(command) > 2 else " ".join(command)


def _verdict(console: Console, checks: Sequence[verdict.Check], figures: dict[str, Any]) -> None:
    console.print()
    for check in checks:
        mark = "[green]held[/] " if check.ok else "[bold red]BROKEN[/]"
        console.print(f"  {mark} {check.name}" + (f": {check.detail}" if check.detail else ""))
    console.print(f"\n[bold]Figures:[/] {render.figures(figures)}")
