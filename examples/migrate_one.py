"""Move one process tree to another host, from a Trio program.

    python examples/migrate_one.py PID HOST:PORT SECRET_FILE

On the other host: python -m pipeline serve --listen 0.0.0.0:7000 --secret-file SECRET_FILE --once
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import trio

import pipeline


class Printer:
    """Shows each phase; a progress listener is any object with these four methods."""

    def phase(self, name: str) -> None:
        """A phase begins."""
        print(f"{name} …", file=sys.stderr)

    def advance(self, bytes_done: int, bytes_total: int | None) -> None:
        """More pages are through; not shown here."""

    def round(self, ended: pipeline.Round) -> None:
        """Memory went over once while the tree ran (not with the mode "stop")."""
        print(f"round {ended.number}: {ended.sent_bytes} bytes", file=sys.stderr)

    def pause(self, parts: Mapping[str, float]) -> None:
        """The tree stood still, for so many milliseconds each."""
        print(f"the pause: {sum(parts.values()):.0f} ms", file=sys.stderr)


async def main(pid: int, to: str, secret_file: str) -> int:
    """Look first, then move; the exit code is the command line's."""
    report = await pipeline.check(pid)
    if report.blockers:
        print("cannot be moved:", *report.blockers, sep="\n  ", file=sys.stderr)
        return 3
    try:
        result = await pipeline.migrate(pid, to, secret_file=secret_file, progress=Printer())
    except pipeline.InDoubt as error:
        # The one case where nobody may just try again: the text says who holds the tree.
        print(error, file=sys.stderr)
        return error.exit_code
    except pipeline.PipelineError as error:
        print(f"{error}\nthe tree runs on here as before", file=sys.stderr)
        return error.exit_code
    print(f"moved: {result.figures}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(trio.run(main, int(sys.argv[1]), sys.argv[2], sys.argv[3]))
