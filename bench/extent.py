"""How much is measured: `TINY` shows that all of it works, `USUAL` takes minutes, `FULL` goes to 4 GiB and 500 MB/s."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("stop", "precopy", "postcopy", "hybrid")


@dataclass(frozen=True)
class Extent:
    """What the sections are given.

    Args:
        sizes: MiB of memory of programs that are dumped and restored.
        wires: MiB of programs that are moved at a stop, with TLS and without.
        live: MiB and MB/s of programs that write while they are moved.
        slowdown: MiB and MB/s of programs that compute while they are moved in rounds.
        modes: by which they are moved.
        services: modes by which real programs are moved.
        idle: connections to Redis that ask nothing, beside its clients.
        processes: of a tree.
        threads: of a process that stands still.
        scale: factors of what there is much of; none: that is left out.
        minutes: no case is begun after that.
        rounds: times that each case is measured, at most.
    """

    sizes: tuple[int, ...]
    wires: tuple[int, ...]
    live: tuple[tuple[int, int], ...]
    slowdown: tuple[tuple[int, int], ...]
    modes: tuple[str, ...]
    services: tuple[str, ...]
    idle: tuple[int, ...]
    processes: tuple[int, ...]
    threads: tuple[int, ...]
    scale: tuple[int, ...]
    minutes: float
    rounds: int


TINY = Extent(
    (1,), (1,), ((1, 1),), ((64, 1),), ("stop", "precopy"), ("precopy",), (10,), (2,), (1,), (1,), 10, 1
)
USUAL = Extent(
    sizes=(16, 256, 1024),
    wires=(1024,),
    live=((16, 5), (64, 20), (1024, 50)),
    slowdown=((1024, 50),),
    modes=MODES,
    services=("stop", "precopy"),
    idle=(0, 1000),
    processes=(50, 500),
    threads=(1, 11, 101),
    scale=(),
    minutes=5,
    rounds=5,
)
FULL = Extent(
    sizes=(16, 64, 256, 1024, 4096),
    wires=(16, 256, 1024, 4096),
    live=tuple((mib, rate) for mib in (16, 64, 256, 1024, 4096) for rate in (0, 50, 200, 500)),
    slowdown=tuple((1024, rate) for rate in (0, 50, 200, 500)),
    modes=MODES,
    services=MODES,
    idle=(0, 1000, 4000),
    processes=(50, 500),
    threads=(1, 11, 101),
    scale=(1, 3, 10),
    minutes=90,
    rounds=3,
)
