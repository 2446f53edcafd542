"""The rooms of the house: imports go one way, and heavy libraries are imported late."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pipeline"

#: pure modules that everybody may import
PURE = {
    "",
    "amounts",
    "errors",
    "events",
    "garbage",
    "ids",
    "interrupts",
    "leftovers",
    "ledger",
    "policy",
    "progress",
}
#: pure modules of other rooms that the pure ones may import
PURE_ELSEWHERE = {"pipeline.userns.idmap", "pipeline.userns.forest"}
#: what each room may import besides itself and `PURE`
ROOMS: dict[str, set[str]] = {
    "image": set(),
    "report": set(),
    "kernel": {"image"},
    "remote": {"image", "kernel"},
    "userns": {"image", "kernel", "remote"},
    "transport": {"image", "kernel"},
    "resources": {"image", "kernel", "remote", "userns"},
    "stages": {"image", "kernel", "remote", "userns", "resources", "transport"},
}
LOWER = set(ROOMS)
RECIPES = {
    "arriving", "check", "dump", "inspect", "live", "migrate", "precopy", "restore", "run", "serve", "standstill",
    "aio", "blocking",
}  # fmt: skip
TOP = {"cli", "demo", "__main__"}

FORBIDDEN_IN_PURE = {"trio", "ctypes", "socket", "ssl", "anyio"}
HEAVY = {"rich", "pyroute2", "obstore", "cryptography", "hypothesis", "anyio", "psutil", "lz4", "zstandard"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(tree: ast.AST, *, late: bool) -> Iterator[str]:
    """Full names of imported modules; with `late` also those inside functions, never those for types only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "pipeline")
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node, late=late)


def allowed(room: str) -> set[str]:
    if room in ROOMS:
        return PURE | ROOMS[room] | {room}
    if room in RECIPES:
        return PURE | LOWER | RECIPES
    if room in TOP:
        return PURE | LOWER | RECIPES | TOP
    assert room in PURE, f"a new room {room!r}: say in this test what it may import"
    return PURE | (RECIPES if not room else set())


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    names = set(imports(ast.parse(path.read_text(encoding="utf-8")), late=True)) - PURE_ELSEWHERE
    rooms = {name.split(".")[1] for name in names if name.startswith("pipeline.")} - {"__version__"}
    assert rooms <= allowed(room_of(path))


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in modules()
        if room_of(path) == "image"
        or path.name == "protocol.py"
        or f"pipeline.{room_of(path)}.{path.stem}" in PURE_ELSEWHERE
    ],
    ids=name_of,
)
def test_records_and_protocol_know_no_loop_no_system_calls_and_no_sockets(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")), late=True)}
    assert not names & FORBIDDEN_IN_PURE


#: where there are no threads yet, or the child is one of `fork_deaf`
_MAY_FORK = {"kernel/forking.py", "cli/within.py", "run.py", "userns/cradle.py", "resources/pump.py"}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_children_are_forked_deaf(path: Path) -> None:
    assert "os.fork()" not in path.read_text(encoding="utf-8") or name_of(path) in _MAY_FORK


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_heavy_libraries_are_imported_where_they_are_used(path: Path) -> None:
    names = {name.split(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")), late=False)}
    assert not names & HEAVY


@pytest.mark.parametrize("words", [["--help"], ["dump", "--help"], ["migrate", "--help"], ["run", "--help"]])
def test_help_imports_no_event_loop(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pipeline", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"trio", "rich", "pyroute2", "asyncio", "msgspec", "ssl"}
