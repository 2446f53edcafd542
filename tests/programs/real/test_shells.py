"""Shell scripts with everything that shells do, pipelines, builds and small interpreters."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import Setting
from tests.programs.real.tree import DEPTHS, RealTree, count_in, lines_of, needs

pytestmark = [pytest.mark.root, pytest.mark.parametrize("setting", DEPTHS, ids=lambda s: s.name)]

#: a coprocess answers, a background pipeline counts, a here-document is read, a trap notes, the shell sleeps
BASH = r"""
trap 'echo trapped >> trapped' USR1
trap 'kill %1 2>/dev/null; echo $i > ended; exit 0' TERM
seq 1000000000 | while read -r n; do echo "$n"; sleep 0.02; done | tr 0-9 a-j > letters &
coproc BC { while read -r a b; do echo $((a + b)); done; }
i=0
while true; do
  i=$((i + 1))
  echo "$i $i" >&"${BC[1]}"
  read -r sum <&"${BC[0]}"
  [ "$sum" = $((2 * i)) ] || echo "the coprocess says $sum for $i" >> wrong
  read -r doc <<END
here $i
END
  [ "$doc" = "here $i" ] || echo "here-document $doc" >> wrong
  [ "$(echo "$i" | cat | cat)" = "$i" ] || echo "pipeline of $i" >> wrong
  echo $i >> counts
  sleep 0.02 & wait $!
done
"""


@needs("bash=bash", "seq=coreutils")
def test_bash(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    tree = launch(setting, ["bash", "-c", BASH], lines_of("counts"))
    tree.all_ways(tmp_path)
    os.kill(tree.pid, signal.SIGUSR1)
    tree.wait_for_file("trapped")
    tree.finish()
    assert not (tree.directory / "wrong").exists(), (tree.directory / "wrong").read_text()
    counts = (tree.directory / "counts").read_text().split()
    assert counts == [str(n) for n in range(1, len(counts) + 1)], "a line is lost or doubled"
    assert (tree.directory / "ended").exists()


def rounds(directory: Path) -> int:
    """Of the tool that has done the fewest."""
    return min(count_in(f"count.{name}")(directory) for name in TOOLS)


TOOLS = ("archive", "mirror", "build", "box", "camel", "database")


@needs("make=make", "rsync=rsync", "busybox=busybox-static", "perl=perl-base", "sqlite3=sqlite3", "gzip=gzip")
def test_tools_side_by_side(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    tree = launch(setting, ["bash", "tools.sh"], rounds, sources=["tools.sh"])
    tree.all_ways(tmp_path)
    tree.finish()
    assert not (tree.directory / "wrong").exists(), (tree.directory / "wrong").read_text()
    assert (tree.directory / "ended").exists()
    camel = (tree.directory / "perl.out").read_text().split()
    assert camel == [str(n) for n in range(len(camel))], "a line is lost or doubled"
    assert tree.log() == ""
