"""Screens that people work on, before and after: tmux with its panes and an attached client, X by VNC."""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.harness.settings import CLONE_NEWIPC, CLONE_NEWNET, DEPTH_1, DEPTH_2, Setting
from tests.harness.tree import ROOT, said
from tests.programs.real.tree import DEPTHS, RealTree, lines_of, needs

pytestmark = pytest.mark.root
T = TypeVar("T")
RFB = ROOT / "examples" / "vnc" / "rfb.py"

#: a tmux server with bash, vim, top and a clock of numbers; a client that is attached, on a terminal of its own
TMUX = r"""
set -eu
tmux="tmux -S socket -f /dev/null"
# a server outlives its sessions and clients as long as this script waits for it
$tmux -D >> tmux.log 2>&1 &
server=$!
trap 'kill $(jobs -p); wait; exit 0' TERM
until [ -S socket ]; do sleep 0.05; done
$tmux set-option -g default-shell /bin/bash
$tmux set-option -g status off
$tmux new-session -d -s work -x 90 -y 24 -n bash "bash --norc --noprofile"
$tmux new-window -d -t work -n vim "vim -u NONE -n text"
$tmux new-window -d -t work -n top "top -d 3600"
$tmux new-window -d -t work -n numbers 'i=0; while sleep 0.05; do i=$((i + 1)); echo $i | tee -a numbers; done'
sleep infinity | TERM=xterm script -qfc "$tmux attach -t work" attached > /dev/null 2>&1 &
touch started
wait $server
"""
#: windows of tmux that show nothing new unless somebody types
QUIET = ("bash", "vim", "top")


def settled(look: Callable[[], T]) -> T:
    """What is seen when nothing new comes any more: the same, many times."""
    seen, count = look(), 1
    while count < 5:
        time.sleep(0.2)
        before, seen = seen, look()
        count = count + 1 if seen == before else 1
    return seen


def tmux(tree: RealTree, *words: str) -> str:
    """What a client of the tree's tmux server prints; it is a process of its own, with the tree's ids."""
    namespace = ["nsenter", "-t", str(tree.root), "-U", "--"]
    done = tree.host.run(*namespace, "tmux", "-S", str(tree.directory / "socket"), *words)
    assert done.returncode == 0, said(done)
    return done.stdout


def screens(tree: RealTree) -> dict[str, str]:
    """What the quiet windows show, with colours, and where their cursors are."""
    cursor = "#{cursor_x} #{cursor_y} #{pane_current_command} #{window_width} #{alternate_on}"
    return {
        name: tmux(tree, "capture-pane", "-e", "-p", "-t", f"work:{name}")
        + tmux(tree, "display-message", "-p", "-t", f"work:{name}", cursor)
        for name in QUIET
    }


@pytest.mark.parametrize("setting", DEPTHS, ids=lambda s: s.name)
@needs("tmux=tmux", "vim=vim", "top=procps", "script=bsdutils")
def test_tmux(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    tree = launch(setting, ["bash", "-c", TMUX], lines_of("numbers"))
    tree.wait_for_file("started")

    def type_into(window: str, *keys: str) -> None:
        tmux(tree, "send-keys", "-t", f"work:{window}", *keys)

    def shows(window: str, text: str) -> None:
        tree.wait(
            f"{window} shows {text}", lambda: text in tmux(tree, "capture-pane", "-p", "-t", f"work:{window}")
        )

    shows("vim", "~")
    type_into("vim", "ifirst line", "Enter", "second", "Escape", ":set number", "Enter", "yy")
    shows("vim", "2 second")
    type_into("bash", "word=kept; history -s earlier; echo said-$((6 * 7))", "Enter", "half a comm")
    shows("bash", "said-42")
    shows("bash", "half a comm")
    shows("top", "load average")
    tree.wait("the client is attached", lambda: tmux(tree, "list-clients").count("\n") == 1)
    before = settled(lambda: screens(tree))
    tree.all_ways(tmp_path)
    assert screens(tree) == before
    assert tmux(tree, "list-clients").count("\n") == 1
    attached = (tree.directory / "attached").stat().st_size
    # what was half typed is finished; the shell's variables and the editor's register are there
    type_into("bash", "C-u", "echo $word-$((6 * 8)) $(tty)", "Enter")
    shows("bash", "kept-48 /dev/pts/")
    tree.wait(
        "the attached client is shown it", lambda: (tree.directory / "attached").stat().st_size > attached
    )
    type_into("vim", "p", ":w", "Enter")
    tree.wait_for_file("text")
    tree.wait(
        "the text is saved", lambda: (tree.directory / "text").read_text() == "first line\nsecond\nsecond\n"
    )
    time.sleep(1.1)  # top tells the time in seconds
    type_into("top", "Space")
    tree.wait("top shows something new", lambda: screens(tree)["top"] != before["top"])
    type_into("top", "q")
    tree.wait("top has ended", lambda: "top" not in tmux(tree, "list-windows", "-t", "work").split())
    tree.finish()


DISPLAY = 77
PORT = 5900 + DISPLAY
#: the clock is above this row, the terminal below
SPLIT = 130
WIDTH, HEIGHT = 360, 300
VNC = rf"""
set -eu
ip link set lo up
trap 'kill $(jobs -p); wait; exit 0' TERM
Xvnc :{DISPLAY} -geometry {WIDTH}x{HEIGHT} -depth 24 -SecurityTypes None -localhost=1 -rfbport {PORT} &
server=$!
until [ -S /tmp/.X11-unix/X{DISPLAY} ]; do kill -0 $server; sleep 0.05; done
export DISPLAY=:{DISPLAY}
xclock -update 1 -geometry 120x120+0+0 &
xterm -fn fixed -bc -geometry 50x11+0+{SPLIT} -e bash --norc --noprofile &
until xwininfo -root -tree | grep -q '"xterm"'; do sleep 0.05; done
touch started
wait $server
"""
#: as `unshare -c -i` of the founding story, and with a network of their own: the hosts here share theirs
ROOMS = [
    DEPTH_1.with_kinds("depth1", CLONE_NEWIPC | CLONE_NEWNET),
    DEPTH_2.with_kinds("depth2", CLONE_NEWIPC | CLONE_NEWNET),
]


class Screen:
    """What a VNC client sees of a tree, inside its network; its call is the progress: pictures of the clock so far."""

    def __init__(self, folder: Path) -> None:
        self.tree: RealTree | None = None
        self._picture = folder / "screen.png"
        self._clocks: set[bytes] = set()

    def __call__(self, _directory: Path) -> int:
        if self.tree is not None and self.tree.alive():
            self._clocks.add(self.rows(0, SPLIT))
        return len(self._clocks)

    def client(self, *words: str) -> None:
        """Run the VNC client."""
        assert self.tree is not None
        inside = ["nsenter", "-t", str(self.tree.root), "-n", "--", sys.executable, str(RFB), str(PORT)]
        done = self.tree.host.run(*inside, *words)
        assert done.returncode == 0, said(done)

    def rows(self, first: int, behind: int) -> bytes:
        """Pixels of some rows of the screen."""
        self.client(str(self._picture))
        data = self._picture.read_bytes()
        packed = data.split(b"IDAT", 1)[1]
        stride = 1 + 3 * WIDTH
        return zlib.decompressobj().decompress(packed)[first * stride : behind * stride]

    def type(self, text: str) -> None:
        """Type into the terminal."""
        self.client("100", str(SPLIT + 60), text)


@pytest.mark.parametrize("setting", ROOMS, ids=lambda s: s.name)
@needs(
    "Xvnc=tigervnc-standalone-server", "xclock=x11-apps", "xterm=xterm", "xwininfo=x11-utils", "ip=iproute2"
)
def test_vnc(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    screen = Screen(tmp_path)
    tree = launch(setting, ["bash", "-c", VNC], screen)
    try:
        tree.wait_for_file("started")
        screen.tree = tree
        screen.type("word=kept; echo said-$((6*7)) > said; ls -d /\n# half a co")
        tree.wait_for_file("said")
        before = settled(lambda: screen.rows(SPLIT, HEIGHT))
        assert len(set(before)) > 1, "the terminal is blank"
        tree.all_ways(tmp_path)
        assert screen.rows(SPLIT, HEIGHT) == before
        screen.type("mment\necho $word-$((6*8)) $(tty) > then\n")
        tree.wait("the shell has answered", lambda: "/dev/pts/" in tree.wait_for_file("then").read_text())
        assert (tree.directory / "then").read_text().startswith("kept-48 ")
        assert screen.rows(SPLIT, HEIGHT) != before
        tree.finish()
    finally:
        for name in (f"/tmp/.X{DISPLAY}-lock", f"/tmp/.X11-unix/X{DISPLAY}"):
            Path(name).unlink(missing_ok=True)
