"""The case that this project started from: a clock on a VNC server, in a plain user's own namespaces.

A user runs ``unshare -c -i ./vncserver.sh xclock``: a user namespace with a map of one id that is not 0,
an ipc namespace of its own, everything else the host's. Root dumps it and restores it, and migrates it to
another host. The clock's hands go on, and a VNC client connects before and after.

Everything happens in namespaces made for it: this machine's /tmp and ports are not touched. Each host is
a pid and a network namespace in there, with a cable between them; they have the same files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipeline.kernel.syscalls import mount

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PORT = "5901"
UID = GID = 1000
PATIENCE_S = 30.0
MS_BIND = 4096
PLACE = Path("/tmp/seed")
_INSIDE = "SEED_CASE_INSIDE"
#: the first process of a host: lets the kernel reap what is orphaned
_INIT = (
    "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('up', flush=True); signal.pause()"
)


class Host:
    """A machine of its own, as far as the tree can tell: processes, network, and sockets in /tmp/.X11-unix."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        command = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--net"]
        self._process = subprocess.Popen(
            [*command, sys.executable, "-c", _INIT], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        self.init = children.read_text().split()[0]
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "-o", "mode=1777", "x11", "/tmp/.X11-unix")

    def close(self) -> None:
        """End it, and all that runs on it."""
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()

    def command(self, *words: str) -> list[str]:
        """The command that runs `words` on this host."""
        return ["nsenter", "-t", self.init, "-p", "-m", "-n", f"-w{PLACE}", "--", *words]

    def run(self, *words: str) -> str:
        """Run a command to its end; what it prints."""
        done = subprocess.run(self.command(*words), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            sys.exit(f"host {self.name}: {' '.join(words)} ended with status {done.returncode}")
        return done.stdout

    def pipeline(self, *words: str) -> None:
        """Run the engine, as a person would."""
        print(f"host {self.name}# python -m pipeline {' '.join(words)}", flush=True)
        self.run(sys.executable, "-m", "pipeline", *words)

    def runs(self) -> bool:
        """Whether anything of the user runs here."""
        found = subprocess.run(self.command("pgrep", "-U", str(UID)), stdout=subprocess.PIPE, check=False)
        return bool(found.stdout)

    def screenshot(self) -> bytes:
        """What a VNC client on this host is shown now, as PNG."""
        picture = PLACE / "screenshot.png"
        self.run(sys.executable, str(HERE / "rfb.py"), PORT, str(picture))
        return picture.read_bytes()

    def show_clock(self, name: str) -> None:
        """A client connects, sees the hands move, and keeps what it saw last."""
        shown = {self.screenshot()}

        def moved() -> bool:
            shown.add(self.screenshot())
            return len(shown) > 2  # the first may show a screen without a clock

        wait_until("the clock's hands move", moved)
        Path(name).write_bytes(self.screenshot())  # below the directory that was given, wherever it is
        print(f"  a VNC client sees the clock go: {name}", flush=True)
        print(self.run("ps", "-o", "pid,uid,args", "-U", str(UID), "--no-headers"), end="", flush=True)


def wait_until(what: str, holds: Callable[[], bool]) -> None:
    """Wait for a condition, or end the example."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not after {PATIENCE_S:.0f} s")
        time.sleep(0.1)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts with a cable between them, and a /tmp that both have."""
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    # what this example runs from may itself lie in the /tmp that is covered now
    needed = {
        path: os.open(path, os.O_PATH) for path in (ROOT, Path(sys.prefix)) if path.is_relative_to("/tmp")
    }
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "seed", "/tmp"], check=True)
    for path, fd in needed.items():
        path.mkdir(parents=True, exist_ok=True)
        mount(f"/proc/self/fd/{fd}".encode(), os.fsencode(path), None, MS_BIND)
        os.close(fd)
    Path("/tmp/.X11-unix").mkdir()
    PLACE.mkdir()
    PLACE.chmod(0o755)
    with ExitStack() as stack:
        one, two = Host("one", "192.0.2.1"), Host("two", "192.0.2.2")
        stack.callback(one.close)
        stack.callback(two.close)
        ends = ["netns", one.init, "type", "veth", "peer", "name", "cable", "netns", two.init]
        subprocess.run(["ip", "link", "add", "cable", *ends], check=True)
        for host in (one, two):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
        yield one, two


def start(host: Host) -> str:
    """What the user runs; its pid there."""
    shutil.copy(HERE / "vncserver.sh", PLACE)
    host.run("sh", "-c", "echo 300 > /proc/sys/kernel/ns_last_pid")  # numbers that are free on the other, too
    seed = ["unshare", "-c", "-i", "./vncserver.sh", "xclock", "-update", "1"]
    print(f"host {host.name}, uid {UID}$ {' '.join(seed)}", flush=True)
    user = ["setpriv", f"--reuid={UID}", f"--regid={GID}", "--clear-groups"]
    with open(PLACE / "log", "wb") as log:
        # the host's first process takes its end
        subprocess.run(
            host.command("sh", "-c", '"$@" &', "sh", *user, "setsid", *seed),
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}, check=True,
        )  # fmt: skip
    wait_until("the X server runs", lambda: (Path("/tmp/.X1-lock")).exists())
    return host.run("pgrep", "-o", "-U", str(UID), "-f", "vncserver.sh").strip()


def play() -> None:
    """Started on one host, dumped and restored there, migrated to the other."""
    with two_hosts() as (one, two), ExitStack() as stack:
        pid = start(one)
        one.show_clock("1-started.png")

        one.pipeline("dump", "--pid", pid, "--to", f"{PLACE}/image")
        wait_until("the tree is gone", lambda: not one.runs())
        one.pipeline("restore", "--from", f"{PLACE}/image", "--detach")
        one.show_clock("2-restored.png")

        secret = PLACE / "secret"
        secret.touch(0o600)
        secret.write_text(os.urandom(32).hex())
        listen = ["--listen", f"{two.address}:7000", "--secret-file", str(secret)]
        server = subprocess.Popen(
            two.command(sys.executable, "-m", "pipeline", "serve", *listen), stdout=subprocess.PIPE
        )
        stack.callback(server.wait)
        stack.callback(server.terminate)
        assert server.stdout is not None
        server.stdout.readline()
        one.pipeline("migrate", "--pid", pid, "--to", f"{two.address}:7000", "--secret-file", str(secret))
        if one.runs() or not two.runs():
            sys.exit("the tree is not where it belongs")
        two.show_clock("3-migrated.png")
    print("the clock went on: started, restored, migrated")


def main() -> None:
    """``python examples/vnc/seed_case.py DIRECTORY``: the pictures go there."""
    if len(sys.argv) != 2:
        sys.exit("usage (as root): python examples/vnc/seed_case.py DIRECTORY-FOR-PICTURES")
    missing = [name for name in ("Xvnc", "xclock", "setpriv", "unshare", "ip") if shutil.which(name) is None]
    if missing:
        sys.exit(
            f"not installed: {', '.join(missing)} (Debian: tigervnc-standalone-server x11-apps util-linux iproute2)"
        )
    if os.geteuid():
        sys.exit("this example makes two hosts: run it as root")
    if _INSIDE not in os.environ:
        os.environ[_INSIDE] = "1"
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execvp(
            "unshare", ["unshare", "--mount", "--", sys.executable, str(HERE / "seed_case.py"), sys.argv[1]]
        )
    Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
    os.chdir(sys.argv[1])
    play()


if __name__ == "__main__":
    main()
