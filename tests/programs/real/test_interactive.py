"""Programs that somebody sits at: an editor and a pager on terminals, a notebook; and a traced program, which stays."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from tests.harness.hosts import inner_pid
from tests.harness.settings import CLONE_NEWNET, Setting
from tests.harness.tree import Workshop, children_of, find_python
from tests.programs.real.test_languages import goes_all_ways
from tests.programs.real.tree import DEPTHS, RealTree, lines_of, needs

pytestmark = [pytest.mark.root, pytest.mark.parametrize("setting", DEPTHS, ids=lambda s: s.name)]


@needs("vim=vim", "less=less")
def test_vim_and_less(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    tree = launch(setting, [find_python(), "typist.py"], lines_of("counts"), sources=["typist.py"])
    goes_all_ways(tree, tmp_path)


_NOT_NEEDED = shutil.ignore_patterns("tests", "__pycache__")


def required(name: str, found: dict[str, metadata.Distribution]) -> None:
    """A distribution and everything that it requires here, by name."""
    key = re.sub(r"[-_.]+", "-", name).lower()
    if key in found:
        return
    try:
        found[key] = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return  # for another platform, or an extra
    for line in found[key].requires or ():
        if "extra ==" not in line:
            required(re.split(r"[^\w.-]", line, maxsplit=1)[0], found)


@pytest.fixture(scope="module")
def site(workshop: Workshop) -> Path:
    """ipykernel and jupyter_client with what they require, where every uid can read them."""
    path = workshop.directory()
    found: dict[str, metadata.Distribution] = {}
    for name in ("ipykernel", "jupyter_client"):
        required(name, found)
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            source, target = Path(str(distribution.locate_file(top))), path / top
            if source.is_dir() and top != "__pycache__":
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=_NOT_NEEDED)
            elif source.is_file():
                shutil.copy(source, target)
    return path


@needs("ip=iproute2", modules=["ipykernel", "jupyter_client"])
def test_jupyter(launch: Callable[..., RealTree], site: Path, setting: Setting, tmp_path: Path) -> None:
    transport = "tcp" if setting.depth == 1 else "ipc"
    # even so it listens on TCP (its debugger), where two hosts on one machine would be in each other's way
    tree = launch(
        setting.with_kinds(setting.name, CLONE_NEWNET),
        ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", find_python(), "notebook.py", transport],
        lines_of("counts"),
        sources=["notebook.py"],
        environment={"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "IPYTHONDIR": "ipython"},
    )
    goes_all_ways(tree, tmp_path)


@needs("strace=strace")
def test_a_traced_program_is_refused_by_name_and_goes_on(
    launch: Callable[..., RealTree], setting: Setting, tmp_path: Path
) -> None:
    script = "while sleep 0.02; do echo; done > counts"
    tree = launch(setting, ["strace", "-f", "-o", "trace", "sh", "-c", script], lines_of("counts"))
    tree.goes_on()
    for pid in (tree.root, inner_pid(children_of(tree.pid)[0])):
        for command in (["dump", "--to", tmp_path / "image"], ["check"]):
            done = tree.host.engine(*command, "--pid", str(pid))
            assert done.returncode == 3, done.stderr
            assert "strace" in done.stderr + done.stdout
            assert not (tmp_path / "image").exists()
    tree.goes_on(3)
