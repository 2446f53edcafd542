"""CRIU on the same program, if one that works is there: ``CRIU=…`` names it, else PATH.

Whether it works is tried, not believed: a program is dumped and restored. Its program runs without a user namespace,
because CRIU needs more around one than a bench has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from bench.commands import Writer, longest_gap_ms
from bench.matrix import Failed
from tests.harness.tree import reap

#: how long a program goes on before it is dumped and after it was, so that its gaps are logged
_SETTLE_S = 0.2


@dataclass(frozen=True)
class Criu:
    """A CRIU, or why there is none.

    Args:
        path: of the command; None: none was found.
        version: what it says it is.
        why_not: None: it works here.
    """

    path: str | None
    version: str
    why_not: str | None

    @classmethod
    def find(cls, folder: Path) -> Criu:
        """The one that the environment or PATH names, tried in an empty directory."""
        named = os.environ.get("CRIU")
        path = shutil.which(named or "criu", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path is None:
            return cls(
                None, "", f"{named} is no command" if named else "no command criu, and CRIU is not set"
            )
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = done.stdout.strip().removeprefix("Version: ").split("\n")[0]
        criu = cls(path, version, None)
        try:
            with Writer.started(folder, 1, nested=False) as writer:
                criu.dump(writer, folder / "criu")
                criu.restore(folder / "criu")
                good = writer.is_whole()
        except (Failed, OSError) as error:
            return cls(path, version, str(error))
        return cls(path, version, None if good else "what it restores is not what it dumped")

    def dump(self, writer: Writer, images: Path, *options: str) -> float:
        """Milliseconds of a whole command; Failed if it does not succeed."""
        images.mkdir()
        lasted_ms = self._run("dump", "--tree", str(writer.pid), "--images-dir", str(images), *options)
        if "--leave-running" not in options:
            reap([writer.pid])
        return lasted_ms

    def restore(self, images: Path) -> float:
        """Likewise; the program has the pid that it had."""
        return self._run("restore", "--restore-detached", "--images-dir", str(images))

    def there_and_back(self, writer: Writer, folder: Path) -> dict[str, float]:
        """Figures of a dump that leaves the writer running, of one that ends it, and of its restore, in ms."""
        time.sleep(_SETTLE_S)
        since = time.time()
        self.dump(writer, folder / "criu.running", "--leave-running")
        time.sleep(_SETTLE_S)
        felt = longest_gap_ms(writer.log, since)
        shutil.rmtree(folder / "criu.running")
        dump_ms = self.dump(writer, folder / "criu")
        restore_ms = self.restore(folder / "criu")
        shutil.rmtree(folder / "criu")
        return {"criu-dump-felt-ms": felt, "criu-dump-ms": dump_ms, "criu-restore-ms": restore_ms}

    def _run(self, *words: str) -> float:
        assert self.path is not None
        begin = time.monotonic()
        done = subprocess.run(
            [self.path, *words, "-v1"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            last = (done.stdout + done.stderr).strip().rpartition("\n")[2]
            raise Failed(f"criu {words[0]}: exit code {done.returncode}: {last}")
        return 1e3 * (time.monotonic() - begin)
