"""The demo's stage on the real kernel, and its verdict: each check is seen to fail where it should."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.demo import verdict
from pipeline.demo.scene import ADDRESSES, Scene, wait_until
from pipeline.errors import PipelineError
from pipeline.userns import cradle

pytestmark = pytest.mark.skipif(
    not cradle.is_privileged(), reason="hosts need CAP_SYS_ADMIN; `demo` gets it itself"
)

HOSTS = ("host-a", "host-b")


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene


def test_the_tree_spans_three_levels_and_counts_on_its_host_only(scene: Scene) -> None:
    tree = scene.source.ask("tree", root=scene.root)
    assert [process["user namespace"] for process in verdict.topology(tree)] == [0, 0, 1, 2]
    assert [process["NSpid"].split()[-1] for process in tree][2:] == ["1", "2"]
    assert scene.destination.ask("tree", root=scene.root) == []
    steps = len(scene.log())
    wait_until(lambda: len(scene.log()) >= steps + 20, "it does not count")
    checks = {check.name: check for check in verdict.counting(scene.log(), HOSTS)}
    assert checks["the tree's own checks"].ok
    assert checks["no step lost or doubled"].ok
    # it has not moved, and the verdict knows
    assert not checks["moved once"].ok
    assert all(check.ok for check in verdict.same_tree(tree, scene.source.ask("tree", root=scene.root)))


def test_the_hosts_reach_each_other_and_the_service_address_moves(scene: Scene) -> None:
    scene.move_service_address()
    program = f"import socket; socket.create_server(('{ADDRESSES['host-b']}', 7001)).accept()"
    server = scene._spawn(scene.destination, [sys.executable, "-W", "ignore", "-c", program], "server", "")
    program = (
        "import socket, time\n"
        "for _ in range(200):\n"
        "    try: socket.create_connection(('10.77.0.2', 7001)); break\n"
        "    except OSError: time.sleep(0.02)\n"
        "else: raise SystemExit(1)"
    )
    client = scene._spawn(scene.source, [sys.executable, "-W", "ignore", "-c", program], "asker", "")
    assert scene.source.ask("wait", pid=client, patience_s=10) == 0
    assert scene.destination.ask("wait", pid=server, patience_s=10) == 0
    seen = scene.end_client()
    assert verdict.asked(seen).ok


def test_a_tree_that_is_killed_is_seen(scene: Scene) -> None:
    before = scene.source.ask("tree", root=scene.root)
    scene.source.ask("kill", pid=before[-1]["pid"], number=signal.SIGKILL)
    wait_until(lambda: any("fault" in line for line in scene.log()), "nobody noticed")
    checks = {check.name: check for check in verdict.counting(scene.log(), HOSTS)}
    assert not checks["the tree's own checks"].ok
    assert "gone" in checks["the tree's own checks"].detail


def test_what_a_host_cannot_do_is_said(scene: Scene) -> None:
    with pytest.raises(PipelineError, match=r"host-a: .*No such process"):
        scene.source.ask("kill", pid=31000, number=15)


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("pid", 4, "same pids"),
        ("NSpid", "1004 2", "same pids inside"),
        ("parent", 1, "same parents"),
        ("Name", "sh", "same programs"),
        ("Threads", "9", "same threads"),
        ("Uid", "0 0 0 0", "same uids and gids"),
        ("user namespace", "user:[1]", "same user namespaces"),
        ("uid_map", "0 0 1", "same maps"),
        ("setgroups", "deny", "same maps"),
    ],
)
def test_a_difference_is_seen(field: str, value: object, name: str) -> None:
    process: dict[str, Any] = {
        "pid": 1004,
        "parent": 1000,
        "command": ["python3", "tree.py", "middle"],
        "user namespace": "user:[5]",
        "pid namespace": "pid:[6]",
        "Name": "python3",
        "Uid": "100000 100000 100000 100000",
        "Gid": "100000 100000 100000 100000",
        "NSpid": "1004 1",
        "Threads": "1",
        "uid_map": "0 100000 65536",
        "gid_map": "0 100000 65536",
        "setgroups": "allow",
    }
    before = [process | {"pid": 1000, "user namespace": "user:[5]"}, process]
    after = copy.deepcopy(before)
    assert all(check.ok for check in verdict.same_tree(before, after))
    after[1][field] = value
    assert [check.name for check in verdict.same_tree(before, after) if not check.ok] == [name]


def step(number: int, host: str, **more: Any) -> dict[str, Any]:
    names = ("conductor", "middle", "deep")
    line: dict[str, Any] = {"step": number, "at_s": number / 100, "host": host, "verified": number in {1, 4}}
    return line | {
        "threads": [number, number],
        "processes": [{"name": name, "uid_map": "0 1 1"} for name in names],
        **more,
    }


def moved() -> list[dict[str, Any]]:
    return [step(number, HOSTS[number > 3]) for number in range(1, 7)]


def failing(log: list[dict[str, Any]]) -> list[str]:
    return [check.name for check in verdict.counting(log, HOSTS) if not check.ok]


def test_a_log_without_a_gap_holds() -> None:
    assert failing(moved()) == []
    assert verdict.pause_s(moved(), HOSTS) == pytest.approx(0.01)


def test_lost_and_doubled_steps_a_second_move_and_other_maps_are_seen() -> None:
    log = moved()
    assert failing(log[:2] + log[3:]) == ["no step lost or doubled"]
    assert failing([*log[:2], log[1], *log[2:]]) == ["no step lost or doubled"]
    assert failing([*log, step(7, HOSTS[0])]) == ["moved once"]
    assert failing([*log, step(7, "host-c")]) == ["moved once"]
    log[3]["processes"][1]["uid_map"] = "0 2 1"
    assert failing(log) == ["maps seen from inside, on both hosts"]
    log = moved()
    log[4]["threads"] = [0, 5]
    assert failing(log) == ["threads go on counting"]
    assert failing([*moved(), step(7, HOSTS[1], fault="ids are others")]) == ["the tree's own checks"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_interrupted_leaves_no_process_behind(number: signal.Signals) -> None:
    program = (
        "import time\nfrom pipeline.demo import show\nfrom pipeline.demo.scene import Scene\nimport signal\n"
        "signal.signal(signal.SIGTERM, show._interrupt)\n"
        "with Scene() as scene:\n    print(scene.work, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        work = Path(process.stdout.readline().strip())
        process.send_signal(number)
        process.wait(20)
    if number != signal.SIGKILL:
        assert not work.exists()
        return
    # the hosts die with their maker; what is left is the directory, and `clean` knows it
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "clean"], capture_output=True, text=True, check=True
    )
    assert f"removed {work}" in done.stdout
    deadline = time.monotonic() + 60
    while _running(work) and time.monotonic() < deadline:
        while _reap():
            pass
        time.sleep(0.01)
    assert not _running(work)


def _running(work: Path) -> list[str]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(work).encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            continue
    return found


def _reap() -> bool:
    try:
        return os.waitpid(-1, os.WNOHANG)[0] != 0
    except ChildProcessError:
        return False


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    from pipeline.cli import render

    render.document({"checks": [verdict.Check("name", True, "detail")._asdict()]})
    assert json.loads(capsys.readouterr().out)["checks"][0]["ok"] is True
