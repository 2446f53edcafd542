"""A command of the engine that runs beside a test, and what its events say."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from tests.harness.hosts import terminate

_DEADLINE_S = 40.0


class Running:
    """A process of the engine, and the file of its events."""

    def __init__(self, process: subprocess.Popen[str], events: Path) -> None:
        self.process = process
        self._events = events

    def phases(self) -> list[str]:
        if not self._events.exists():
            return []
        lines = self._events.read_text().splitlines()
        return [event["name"] for event in map(json.loads, lines) if event["event"] == "phase"]

    def wait_for(self, phase: str, times: int = 1) -> None:
        until = time.monotonic() + _DEADLINE_S
        while self.phases().count(phase) < times:
            assert self.process.poll() is None, terminate(self.process)
            assert time.monotonic() < until, f"no phase {phase}: {self.phases()} {terminate(self.process)}"
            time.sleep(0.02)

    def ends_well(self) -> dict[str, float]:
        out, err = self.process.communicate(timeout=_DEADLINE_S)
        assert self.process.returncode == 0, err
        figures: dict[str, float] = json.loads(out)["figures"]
        return figures
