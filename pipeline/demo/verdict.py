"""Did the tree go on as if nothing had happened? Pure checks of what was seen before and after."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

Process = dict[str, Any]


class Check(NamedTuple):
    """One thing that must hold."""

    name: str
    ok: bool
    detail: str


def topology(processes: Sequence[Process]) -> list[Process]:
    """Processes with their namespaces numbered in order of appearance: the inodes are another host's."""
    numbers: dict[str, dict[str, int]] = {"user namespace": {}, "pid namespace": {}}
    result = []
    for process in processes:
        named = {kind: seen.setdefault(process[kind], len(seen)) for kind, seen in numbers.items()}
        result.append(process | named)
    return result


def same_tree(before: Sequence[Process], after: Sequence[Process]) -> list[Check]:
    """The same processes, pids at every level, ids, maps, threads and shape of the tree."""
    old, new = topology(before), topology(after)
    checks = [
        Check(
            "same pids",
            [p["pid"] for p in old] == [p["pid"] for p in new],
            ", ".join(str(p["pid"]) for p in new) or "none",
        )
    ]
    by_pid = {p["pid"]: p for p in new}
    subjects = {
        "same pids inside": ("NSpid",),
        "same parents": ("parent",),
        "same programs": ("Name", "command"),
        # http.server makes a thread for each request
        "same threads": ("Threads",),
        "same uids and gids": ("Uid", "Gid"),
        "same user namespaces": ("user namespace", "pid namespace"),
        "same maps": ("uid_map", "gid_map", "setgroups"),
    }
    for name, fields in subjects.items():
        wrong = [
            f"pid {p['pid']} {field}: {p[field]} became {by_pid[p['pid']][field]}"
            for p in old
            for field in fields
            if p["pid"] in by_pid
            and not (field == "Threads" and "http.server" in p["command"])
            and p[field] != by_pid[p["pid"]][field]
        ]
        checks.append(Check(name, not wrong and bool(by_pid), "; ".join(wrong)))
    return checks


def counting(log: Sequence[dict[str, Any]], hosts: tuple[str, str]) -> list[Check]:
    """No step lost or doubled, seen by the tree itself and by the log; ids and maps checked from inside."""
    numbers = [line["step"] for line in log]
    faults = [line["fault"] for line in log if "fault" in line]
    visited = [host for host, _ in groupby(log, key=itemgetter("host"))]
    there = [line for line in log if line["host"] == hosts[1]]
    verified = [line for line in log if line["verified"] and "processes" in line]
    threads = [line["threads"] for line in log if "threads" in line]
    steady = all(b >= a for one, two in pairwise(threads) for a, b in zip(one, two, strict=True))
    maps: dict[str, list[str]] = {}
    for line in verified:
        for process in line["processes"]:
            maps.setdefault(process["name"], []).append(process["uid_map"])
    same = len(verified) == 2 and all(len(seen) == 2 and len(set(seen)) == 1 for seen in maps.values())
    return [
        Check("the tree's own checks", not faults, faults[0] if faults else "every step, on every level"),
        Check(
            "no step lost or doubled",
            numbers == list(range(1, len(numbers) + 1)) and bool(numbers),
            f"{len(log) - len(there)} steps on {hosts[0]}, {len(there)} on {hosts[1]}",
        ),
        Check("moved once", visited == list(hosts), " -> ".join(visited)),
        Check("threads go on counting", steady and len(there) > 1, str(threads[-1]) if threads else "none"),
        Check(
            "maps seen from inside, on both hosts",
            same and len(maps) == 3,
            "; ".join(f"{name}: {' then '.join(dict.fromkeys(seen))}" for name, seen in maps.items()),
        ),
    ]


def pause_s(log: Sequence[dict[str, Any]], hosts: tuple[str, str]) -> float | None:
    """Seconds between the last step on the first host and the first on the second, by the tree's own clock."""
    before = [line["at_s"] for line in log if line["host"] == hosts[0]]
    after = [line["at_s"] for line in log if line["host"] == hosts[1]]
    return after[0] - before[-1] if before and after else None


def asked(seen: dict[str, Any]) -> Check:
    """The client was answered all the while, and never wrongly."""
    return Check(
        "http.server answers the client",
        seen["answered"] > 0 and seen["wrong"] == 0,
        f"{seen['answered']} answers, {seen['wrong']} wrong, {seen['tried-again']} tries repeated, "
        f"longest pause {seen['longest-pause-s'] * 1000:.0f} ms",
    )
