"""Process 1 of a host: takes requests from stdin, one JSON document a line, and answers on stdout.

It owns the host's network namespace, reaps what is orphaned, and dies with the demo
(PDEATHSIG, end of stdin); the kernel then ends everything else in its pid namespace.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.kernel.syscalls import PRCTL, prctl

_STATUS_FIELDS = ("Name", "Uid", "Gid", "NSpid", "Threads")


class Agent:
    """The requests, one method each; what a method returns is the answer."""

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}

    def reap(self) -> None:
        """Take the status of every child that has ended, adopted ones too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self.statuses[pid] = status

    def do_cable(self, peer_fd: int, here: str, there: str) -> None:
        """Make a pair of virtual Ethernet ends; the other goes to the network namespace behind `peer_fd`."""
        from pyroute2 import IPRoute

        with IPRoute() as route:
            route.link("add", ifname=here, kind="veth", peer={"ifname": there, "net_ns_fd": peer_fd})
        os.close(peer_fd)

    def do_interface(self, name: str, address: str, prefix: int) -> None:
        """Give an interface an address and set it up."""
        from pyroute2 import IPRoute

        with IPRoute() as route:
            (index,) = route.link_lookup(ifname=name)
            route.addr("add", index=index, address=address, prefixlen=prefix)
            route.link("set", index=index, state="up")

    def do_address(self, action: str, name: str, address: str) -> None:
        """``add`` or ``del`` the service address (a /32) on an interface."""
        from pyroute2 import IPRoute

        with IPRoute() as route:
            (index,) = route.link_lookup(ifname=name)
            route.addr(action, index=index, address=address, prefixlen=32)

    def do_next_pid(self, pid: int) -> None:
        """Let the next process of this host get `pid`."""
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1), encoding="ascii")

    def do_spawn(self, command: list[str], out: str, err: str, environ: dict[str, str]) -> int:
        """Start a program in a session of its own; returns its pid here."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        return os.posix_spawn(
            command[0],
            command,
            os.environ | environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, out, flags, 0o600),
                (os.POSIX_SPAWN_OPEN, 2, err, flags, 0o600),
            ],
            setsid=True,
            setsigdef=[signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ],
        )

    def do_wait(self, pid: int, patience_s: float) -> int | None:
        """Exit code of a child (negative: the signal), None if it still runs after `patience_s`."""
        deadline = time.monotonic() + patience_s
        while pid not in self.statuses:
            if time.monotonic() > deadline:
                return None
            self.reap()
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(self.statuses[pid])

    def do_kill(self, pid: int, number: int) -> None:
        """Send a signal."""
        os.kill(pid, number)

    def do_tree(self, root: int) -> list[dict[str, Any]]:
        """A process and its descendants as this host sees them; an empty list if it is not here."""
        import psutil

        try:
            top = psutil.Process(root)
            members = [top, *top.children(recursive=True)]
            return [self._describe(process) for process in sorted(members, key=lambda process: process.pid)]
        except psutil.NoSuchProcess:
            return []

    def _describe(self, process: Any) -> dict[str, Any]:
        folder = Path(f"/proc/{process.pid}")
        status = dict(
            line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines()
        )
        return {
            "pid": process.pid,
            "parent": process.ppid(),
            "command": process.cmdline(),
            "user namespace": os.readlink(folder / "ns/user"),
            "pid namespace": os.readlink(folder / "ns/pid"),
            **{field: " ".join(status[field].split()) for field in _STATUS_FIELDS},
            **{
                name: " ".join((folder / name).read_text(encoding="ascii").split())
                for name in ("uid_map", "gid_map", "setgroups")
            },
        }


def _close_all_but(kept: set[int]) -> None:
    """Nothing that the demo's caller left open may be on a host: it would be held by the tree, too."""
    for fd in sorted(int(entry) for entry in os.listdir("/proc/self/fd")):
        if fd not in kept:
            with suppress(OSError):
                os.close(fd)


def main(name: str, kept: set[int]) -> None:
    """Serve requests until stdin ends; of the descriptors, only 0, 1, 2 and `kept` stay open."""
    prctl(PRCTL.SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    socket.sethostname(name)
    _close_all_but({0, 1, 2, *kept})
    agent = Agent()
    poll = select.poll()
    poll.register(0, select.POLLIN)
    print(json.dumps({"answer": os.uname().nodename}), flush=True)
    buffer = b""
    while True:
        agent.reap()
        if not poll.poll(50):
            continue
        piece = os.read(0, 65536)
        if not piece:
            return
        buffer += piece
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            request = json.loads(line)
            reply: dict[str, Any]
            try:
                reply = {"answer": getattr(agent, f"do_{request.pop('do')}")(**request)}
            except Exception as error:  # noqa: BLE001 (whatever it is, the demo tells it)
                reply = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], set(map(int, sys.argv[2:])))
