"""The benchmark: a tiny run is well-formed and was right everywhere; what is wrong, fails or has no time is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.commands import Writer, longest_gap_ms
from bench.matrix import Case, Failed, Results, Row, Sample, run
from bench.page import page
from pipeline.kernel.smaps import maps
from tests.harness.pages import Page
from tests.harness.tree import ROOT

NO_END_S = 3600.0


class Figure(msgspec.Struct, forbid_unknown_fields=True):
    median: float
    least: float
    most: float
    values: list[float]


class Measured(msgspec.Struct, forbid_unknown_fields=True):
    section: str
    name: str
    parameters: dict[str, float | str]
    runs: int
    load: tuple[float, float]
    figures: dict[str, Figure]
    checks: dict[str, bool]
    good: bool
    failed: str | None = None


class Machine(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    processor: str
    cores: int
    memory_bytes: int
    kernel: str
    python: str
    load: tuple[float, float, float]
    date: str
    commit: str


class Tool(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    path: str | None
    version: str
    why_not: str | None


class LeftOut(msgspec.Struct, forbid_unknown_fields=True):
    section: str
    name: str
    why: str


class Document(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    format: int
    machine: Machine
    criu: Tool
    rows: list[Measured]
    left_out: list[LeftOut]


@pytest.mark.root
def test_a_tiny_run_is_well_formed_and_right_everywhere(tmp_path: Path) -> None:
    sections = ("standstill", "plain", "kept", "wire", "live", "crowd")
    words = [word for section in sections for word in ("--only", section)]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--tiny", *words, "--to", tmp_path],
        cwd=ROOT,
        env={**os.environ, "CRIU": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "results.json").read_bytes()
    document = msgspec.json.decode(text, type=Document)
    assert document.criu.why_not == "/nonexistent is no command"
    assert not document.left_out
    assert list(dict.fromkeys(row.section for row in document.rows)) == list(sections)
    for row in document.rows:
        assert row.good, row
        assert row.checks, row
        assert row.runs == 1
        assert row.figures
        assert not any("criu" in name for name in row.figures), "a figure of a tool that is not there"
        for figure in row.figures.values():
            assert figure.least <= figure.median <= figure.most
            assert len(figure.values) == row.runs
    drawn = Page(page(json.loads(text)))
    assert {row.name for row in document.rows} <= set(drawn.rows)
    assert "svg" in drawn.tags


@pytest.mark.root
def test_a_writer_notices_what_is_wrong_with_its_memory(tmp_path: Path) -> None:
    with Writer.started(tmp_path, 4, 1) as writer:
        assert writer.is_whole()
        largest = max(maps(writer.pid), key=lambda mapping: mapping.end - mapping.start)
        with open(f"/proc/{writer.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(largest.start + 4096 * 7 + 2000)
            before = memory.read(1)
            memory.seek(-1, os.SEEK_CUR)
            memory.write(bytes([before[0] ^ 1]))
        assert not writer.is_whole()


def test_gaps_are_those_of_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert longest_gap_ms(log, 0) == 0
    log.write_text("ready\ngap 90.0 at 100.000\ngap 12.5 at 200.000\ngap 8.0 at 201.000\ngap 99")
    assert longest_gap_ms(log, 150) == 12.5
    assert longest_gap_ms(log, 300) == 0


def measured(cases: list[Case], folder: Path, rounds: int = 3, budget_s: float = NO_END_S) -> Results:
    said: list[Row] = []
    return run(cases, folder, most_rounds=rounds, budget_s=budget_s, said=said.append)


def test_cases_are_measured_in_turns(tmp_path: Path) -> None:
    order = []

    def case(name: str, values: list[float]) -> Case:
        def measure(folder: Path) -> Sample:
            assert not list(folder.iterdir())
            (folder / "left behind").touch()
            order.append(name)
            return Sample({"whole-ms": values.pop()}, {"it was right": True})

        return Case("section", name, measure)

    results = measured([case("a", [4.0, 1.0, 9.0]), case("b", [1.0, 1.0, 1.0])], tmp_path)
    assert order == ["a", "b"] * 3
    assert results.are_good
    figure = results.rows[0].document()["figures"]["whole-ms"]
    assert figure == {"median": 4.0, "least": 1.0, "most": 9.0, "values": [9.0, 1.0, 4.0]}
    assert not list(tmp_path.iterdir())


def test_a_check_that_fails_once_is_not_good(tmp_path: Path) -> None:
    found = [True, False, True]
    case = Case("section", "name", lambda _: Sample({}, {"it was right": found.pop()}))
    results = measured([case], tmp_path)
    assert not results.are_good
    assert results.rows[0].document()["checks"] == {"it was right": False}


def test_a_case_without_checks_is_not_good(tmp_path: Path) -> None:
    assert not measured([Case("section", "name", lambda _: Sample({"ms": 1.0}, {}))], tmp_path).are_good


def test_a_case_that_fails_is_not_tried_again_and_others_are(tmp_path: Path) -> None:
    tried = []

    def fails(_: Path) -> Sample:
        tried.append(1)
        raise Failed("exit code 1")

    good = Case("section", "good", lambda _: Sample({"ms": 1.0}, {"it was right": True}))
    results = measured([Case("section", "fails", fails), good], tmp_path)
    assert len(tried) == 1
    assert not results.are_good
    failed, other = (row.document() for row in results.rows)
    assert failed["failed"] == "Failed: exit code 1"
    assert not failed["good"]
    assert other["runs"] == 3
    assert other["good"]


def test_what_is_not_measured_says_why(tmp_path: Path) -> None:
    def never(_: Path) -> Sample:
        raise AssertionError("it is begun")

    cases = [Case("section", "a", never, missing="no such program here"), Case("section", "b", never)]
    results = measured(cases, tmp_path, budget_s=-1)
    assert not results.are_good
    assert [(case.name, why) for case, why in results.left_out] == [
        ("a", "no such program here"),
        ("b", "the time was over"),
    ]
