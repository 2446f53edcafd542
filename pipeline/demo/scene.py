"""The stage: two hosts, the cable between them, the tree on the first, a client on the second.

Everything is taken through one ExitStack and is gone when it closes, whatever happened.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count as count_up
from pathlib import Path
from typing import Any, Self

import pipeline
from pipeline import leftovers
from pipeline.demo.hosts import Host
from pipeline.demo.tree import PORT
from pipeline.errors import PipelineError

SERVICE = "10.77.0.100"
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
ENDS = {"host-a": "cable-a", "host-b": "cable-b"}
GREETING = "hello from the tree\n"
#: pids of the tree on its first host; far from those of the second's own programs
FIRST_PID = 1000
#: how long `migrate` is tried again where nothing but a connection on the way stood against it
_PATIENCE_S = 30.0
_PACKAGE = Path(pipeline.__file__).parent


def available_ids() -> tuple[int, int]:
    """(first, count) of the longest run of uids that this user namespace has, groups alike."""
    lines = []
    for name in ("uid_map", "gid_map"):
        text = Path(f"/proc/self/{name}").read_text(encoding="ascii")
        lines.append({(int(a), int(c)) for a, _, c in (line.split() for line in text.splitlines())})
    return max(lines[0] & lines[1] or {(0, 1)}, key=lambda line: line[1])


def level_maps() -> tuple[str, str]:
    """Maps of levels 1 and 2 that fit into what this user namespace has."""
    first, count = available_ids()
    if count > 200_000:
        return "0:100000:65536", "0:1000:100"
    if count >= 2000:
        return f"0:{first}:{min(count, 65536)}", "0:1000:100"
    # one id only: root inside level 1, and a map without 0 in level 2
    return "0:0:1", "1000:0:1"


def interpreter() -> str:
    """A Python that every uid may execute.

    Raises:
        PipelineError: there is none.
    """
    candidates = [
        os.path.realpath(sys.executable),
        shutil.which("python3", path="/usr/bin:/bin:/usr/local/bin"),
    ]
    single = available_ids()[1] < 2000
    for candidate in filter(None, candidates):
        path = Path(os.path.realpath(candidate))
        if not single and not all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents)):
            continue
        done = subprocess.run(
            [candidate, "-c", "import ctypes, sys; sys.exit(sys.version_info < (3, 11))"],
            capture_output=True,
            check=False,
        )
        if done.returncode == 0:
            return candidate
    raise PipelineError(
        "the demo's tree runs under other uids and needs a Python 3.11 that every uid may execute; "
        f"{candidates[0]} is not, and there is none in /usr/bin (Debian: apt-get install python3)"
    )


def wait_until(condition: Callable[[], bool], what: str, patience_s: float = 20) -> None:
    """Look every 10 ms.

    Raises:
        PipelineError: it did not come true in time.
    """
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            raise PipelineError(f"waited {patience_s:.0f} s in vain: {what}")
        time.sleep(0.01)


class Scene:
    """The stage as an open context manager.

    Attributes:
        work: the directory that both hosts share.
        source, destination: the hosts.
        root: pid of the tree's root, the same on both hosts.
        maps: of user-namespace levels 1 and 2.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.maps = level_maps()
        self.root = 0
        self._client = 0

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        python = interpreter()
        self.work = Path(tempfile.gettempdir(), f"pipeline-demo-{secrets.token_hex(6)}")
        self._stack.enter_context(leftovers.noted("directory", self.work))
        self.work.mkdir(mode=0o700)
        self._stack.callback(shutil.rmtree, self.work)
        self.work.chmod(0o755)
        self._furnish()
        self.destination = self._stack.enter_context(Host("host-b"))
        namespace = os.open(f"/proc/{self.destination.pid}/ns/net", os.O_RDONLY)
        try:
            self.source = self._stack.enter_context(Host("host-a", (namespace,)))
            self.source.ask("cable", peer_fd=namespace, here=ENDS["host-a"], there=ENDS["host-b"])
        finally:
            os.close(namespace)
        for host in (self.source, self.destination):
            host.ask("interface", name=ENDS[host.name], address=ADDRESSES[host.name], prefix=24)
        self.source.ask("address", action="add", name=ENDS["host-a"], address=SERVICE)
        self._start_tree(python)
        self._start_client(python)

    def _furnish(self) -> None:
        shutil.copytree(
            _PACKAGE,
            self.work / "lib" / "pipeline",
            ignore=shutil.ignore_patterns("__pycache__"),
            copy_function=shutil.copyfile,
        )
        (self.work / "www").mkdir()
        (self.work / "www" / "greeting").write_text(GREETING, encoding="utf-8")
        for folder, folders, files in os.walk(self.work):
            for name in folders:
                Path(folder, name).chmod(0o755)
            for name in files:
                Path(folder, name).chmod(0o644)
        fd = os.open(self.work / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")

    def _spawn(self, host: Host, command: list[str], name: str, path: str) -> int:
        pid: int = host.ask(
            "spawn",
            command=command,
            out=str(self.work / f"{name}.out"),
            err=str(self.work / f"{name}.err"),
            environ={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        return pid

    def _start_tree(self, python: str) -> None:
        library = self.work / "lib"
        program = str(library / "pipeline" / "demo" / "tree.py")
        self.source.ask("next_pid", pid=FIRST_PID)
        command = [python, program, "conductor", str(self.work), *self.maps]
        self.root = self._spawn(self.source, command, "tree", str(library))
        wait_until(lambda: len(self.log()) > 10 or self._failed("tree"), "the tree does not count")
        if self._failed("tree"):
            raise PipelineError(f"the tree did not start:\n{self.text('tree.err')}")

    def _failed(self, name: str) -> bool:
        return "Traceback" in self.text(f"{name}.err")

    def _start_client(self, python: str) -> None:
        library = self.work / "lib"
        program = str(library / "pipeline" / "demo" / "client.py")
        result = self.work / "client.json"
        command = [python, program, SERVICE, str(PORT), GREETING, str(result)]
        self._client = self._spawn(self.destination, command, "client", str(library))
        wait_until(result.with_suffix(".ready").exists, "nobody answers the client")

    def text(self, name: str) -> str:
        """What a program wrote so far."""
        path = self.work / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def log(self) -> list[dict[str, Any]]:
        """The tree's steps so far."""
        return [
            json.loads(line) for line in self.text("log").splitlines(keepends=True) if line.endswith("\n")
        ]

    def migrate(self) -> tuple[int, dict[str, Any], str]:
        """`serve` on the destination, `migrate` on the source; returns migrate's exit code, document and stderr.

        The address of the service follows when the tree has arrived, so a connection that the client has open at that
        moment cannot go along: it is closed, and the client asks again. What is only in the way for a moment is
        waited for: it is tried again.

        Raises:
            PipelineError: `serve` does not listen; or `migrate` says it is done and `serve` failed.
        """
        tool = [sys.executable, "-m", "pipeline"]
        path = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
        secret = ["--secret-file", str(self.work / "secret")]
        listen = ["serve", "--listen", f"{ADDRESSES['host-b']}:0", *secret, "--once"]
        server = self._spawn(self.destination, [*tool, *listen], "serve", path)

        def ready() -> bool:
            return (
                "\n" in self.text("serve.out")
                or self.destination.ask("wait", pid=server, patience_s=0) is not None
            )

        wait_until(ready, "`serve` does not listen")
        first = self.text("serve.out").partition("\n")[0]
        if not first.startswith("listening on "):
            raise PipelineError(f"`serve` failed:\n{self.text('serve.err')}")
        to = first.removeprefix("listening on ")
        move = ["migrate", "--pid", str(self.root), "--to", to, *secret, "--tcp", "close", "--json"]
        deadline = time.monotonic() + _PATIENCE_S
        for attempt in count_up():
            name = f"migrate-{attempt}"
            mover = self._spawn(self.source, [*tool, *move], name, path)
            code = self.source.ask("wait", pid=mover, patience_s=60)
            if code is None:
                raise PipelineError(f"`migrate` has not ended after 60 s:\n{self.text(f'{name}.err')}")
            document = json.loads(self.text(f"{name}.out") or "{}")
            blockers = document.get("blockers", [])
            transient = code == 3 and all(blocker["transient"] for blocker in blockers)
            if not transient or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if code == 0:
            self.move_service_address()
            if self.destination.ask("wait", pid=server, patience_s=20) != 0:
                raise PipelineError(f"`migrate` is done, and `serve` failed:\n{self.text('serve.err')}")
        return code, document, self.text(f"{name}.err")

    def move_service_address(self) -> None:
        """The address that the client asks goes where the tree is now."""
        self.source.ask("address", action="del", name=ENDS["host-a"], address=SERVICE)
        self.destination.ask("address", action="add", name=ENDS["host-b"], address=SERVICE)

    def end_client(self) -> dict[str, Any]:
        """Stop the client; returns what it saw."""
        self.destination.ask("kill", pid=self._client, number=15)
        if self.destination.ask("wait", pid=self._client, patience_s=10) != 0:
            raise PipelineError(f"the client failed:\n{self.text('client.err')}")
        seen: dict[str, Any] = json.loads(self.text("client.json"))
        return seen
