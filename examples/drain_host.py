"""Empty this host: move all trees of a list to another, a few at a time.

    python examples/drain_host.py HOST:PORT SECRET_FILE PID [PID...]

Trees that cannot be moved stay where they are and run on; they are listed at the end. Ctrl-C lets those stay that are
not moved yet.
"""

from __future__ import annotations

import sys

import trio

import pipeline

#: trees on the way at the same time: their pages share one wire
AT_ONCE = 2


async def move(
    pid: int, to: str, secret_file: str, limit: trio.CapacityLimiter, moved: set[int], left: dict[int, str]
) -> None:
    """Move one tree; a failure is noted and stops nobody else."""
    async with limit:
        try:
            result = await pipeline.migrate(pid, to, secret_file=secret_file)
        except pipeline.InDoubt as error:
            left[pid] = f"IN DOUBT: {error}"
        except pipeline.PipelineError as error:
            left[pid] = str(error)
        else:
            moved.add(pid)
            print(f"pid {pid} moved: {result.figures}", flush=True)


async def main(to: str, secret_file: str, pids: list[int]) -> int:
    """Look at all of them before any is touched, then move those that can be."""
    moved: set[int] = set()
    left: dict[int, str] = {}
    ready = []
    for pid in pids:
        try:
            report = await pipeline.check(pid)
        except pipeline.PipelineError as error:
            left[pid] = str(error)
            continue
        lasting = [blocker for blocker in report.blockers if not blocker.transient]
        if lasting:
            left[pid] = "; ".join(map(str, lasting))
        else:
            ready.append(pid)
    limit = trio.CapacityLimiter(AT_ONCE)
    try:
        async with trio.open_nursery() as nursery:
            for pid in ready:
                nursery.start_soon(move, pid, to, secret_file, limit, moved, left)
    except* KeyboardInterrupt:
        left.update((pid, "interrupted") for pid in ready if pid not in left and pid not in moved)
    for pid, reason in left.items():
        print(f"pid {pid} stays: {reason}", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    sys.exit(trio.run(main, sys.argv[1], sys.argv[2], [int(word) for word in sys.argv[3:]]))
