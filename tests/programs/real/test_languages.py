"""Services in Node, Java and Go, with what their runtimes bring: threads, collectors, children."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import CLONE_NEWNET, Setting
from tests.harness.tree import Workshop
from tests.programs.real.tree import DEPTHS, SOURCES, RealTree, find, lines_of, needs

pytestmark = [pytest.mark.root, pytest.mark.parametrize("setting", DEPTHS, ids=lambda s: s.name)]


def goes_all_ways(tree: RealTree, folder: Path) -> None:
    """It goes on in all ways, ends by SIGTERM, and nothing was wrong."""
    tree.all_ways(folder)
    tree.finish()
    wrong = tree.directory / "wrong"
    assert not wrong.exists(), wrong.read_text()
    counts = (tree.directory / "counts").read_text().split()
    assert counts == [str(n) for n in range(1, len(counts) + 1)], "a line is lost or doubled"


@needs("node=nodejs", "ip=iproute2")
def test_node(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    # at depth 1 over TCP, on a loopback of the tree's own
    address = "8000" if setting.depth == 1 else "socket"
    tree = launch(
        setting.with_kinds(setting.name, CLONE_NEWNET),
        ["sh", "-c", 'ip link set lo up && exec node service.js "$1"', "sh", address],
        lines_of("counts"),
        sources=["service.js"],
    )
    goes_all_ways(tree, tmp_path)


@pytest.fixture(scope="module")
def classes(workshop: Workshop) -> Path:
    path = workshop.directory()
    command = [find("javac"), "-d", path, SOURCES / "Churn.java"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@needs("java=openjdk-17-jre-headless", "javac=openjdk-17-jdk-headless")
def test_java(launch: Callable[..., RealTree], classes: Path, setting: Setting, tmp_path: Path) -> None:
    collector = "Serial" if setting.depth == 1 else "G1"
    command = ["java", f"-XX:+Use{collector}GC", "-Xms16m", "-Xmx64m", "-cp", classes, "Churn"]
    tree = launch(setting, command, lines_of("counts"))
    goes_all_ways(tree, tmp_path)
    assert "rounds" in (tree.directory / "ended").read_text()


@pytest.fixture(scope="module")
def compiled(workshop: Workshop) -> Path:
    path = workshop.directory()
    shutil.copy(SOURCES / "many.go", path)
    done = subprocess.run(
        [find("go"), "build", "-o", "many", "many.go"],
        cwd=path,
        env={**os.environ, "HOME": str(path), "GOCACHE": str(path / "cache"), "GOFLAGS": "-p=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return path / "many"


@needs("go=golang-go")
def test_go(launch: Callable[..., RealTree], compiled: Path, setting: Setting, tmp_path: Path) -> None:
    goes_all_ways(launch(setting, [compiled], lines_of("counts")), tmp_path)
