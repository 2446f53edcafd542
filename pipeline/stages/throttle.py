"""Holding back a tree that writes faster than it can be sent: parts of its time it stands still.

Slices of standing still, each of some milliseconds: whoever runs then is stopped as for a freeze (PTRACE_SEIZE and
PTRACE_INTERRUPT, `pipeline.stages.freeze.halt`), and let go at its end. Nothing of that is seen by the tree, by its
parent or by a shell: no signal is sent, nobody is told of a stop, and every ptrace stop ends with us, by the
kernel, if we are killed. Between two slices nobody is traced.

Whoever sleeps in the kernel is left alone, because it writes nothing, and its call would be interrupted: where what
is left of its time cannot be asked for it would begin anew with every slice, and never end. Some wake up while others
are stopped: the slice looks again and again for whoever runs. So a process that waits for its vfork child, or is
stopped by job control, is not touched at all. What is left is a thread that falls asleep in the very moment in which it
is stopped: for such see `pipeline.resources.tasks.interrupted`.

Stopping and letting go takes the longer the more threads there are, and so does looking for them. Slices are made so
long that this is a small part of them, and of the time between them.

While this program itself is stopped (^Z) within a slice, the tree stands still, too.

Not held back: who may not be traced; what a device or the kernel writes for the tree.

Source: ptrace(2); QEMU's docs/devel/migration, "auto-converge", and its softmmu/cpu-throttle.c for the idea.
"""

from __future__ import annotations

import time
from contextlib import suppress

import trio

from pipeline.ids import HostPid
from pipeline.kernel import procfs, ptrace
from pipeline.remote.tracer import Tracer
from pipeline.stages import freeze
from pipeline.stages.freeze import Collector, FrozenTree

#: from one slice to the next
_PERIOD_S = 0.05
#: at most, where stopping takes long
_MOST_S = 0.5
#: between two looks for whoever has begun to run
_LOOK_S = 0.002
#: how many times longer than what stopping, or looking, takes the time is in which nothing of it is done
_WORTH = 2
#: how long those that are asked to stop are waited for: a task that runs does so when the processor is given to it
_STOP_S = 0.02


class Throttle:
    """Lets a tree stand still for a share of its time while `run` runs; only `set` is called besides it.

    Args:
        tracer: stops it.
        root: of the tree.

    Ownership: with `set(0)` everybody is let go.
    """

    def __init__(self, tracer: Tracer, root: HostPid) -> None:
        self._tracer = tracer
        self._halted = _Halted(root)
        self._wanted = trio.Event()
        #: how much of its time the tree stands still
        self.percentage = 0
        #: the most that it ever was
        self.most_percentage = 0

    async def set(self, percentage: int) -> None:
        """Hold it back by so much, from 0 to 99; with 0, nobody is stopped or traced any more when this returns."""
        self.percentage = percentage
        self.most_percentage = max(self.most_percentage, percentage)
        if percentage:
            self._wanted.set()
        else:
            with trio.CancelScope(shield=True):
                await self._tracer.run(self._halted.release)

    @property
    def held_s(self) -> float:
        """How long the tree stood still, all slices together."""
        return self._halted.held_s

    async def run(self) -> None:
        """Do so, until cancelled."""
        while True:
            while not self.percentage:
                self._wanted = trio.Event()
                await self._wanted.wait()
            share = self.percentage / 100
            await self._tracer.run(self._halted.stop)
            worth_s = _WORTH * self._halted.cost_s / min(share, 1 - share)
            period_s = min(max(_PERIOD_S, worth_s), _MOST_S)
            # what it had too much before, because we came late, is made up for
            slice_s = max(share * period_s, self._halted.ran_s * share / (1 - share))
            await self._hold(time.monotonic() + min(slice_s, _MOST_S))
            await self._let_go(time.monotonic() + (1 - share) * period_s)

    async def _hold(self, until_s: float) -> None:
        """The rest of a slice."""
        look_s = 0.0
        while self.percentage and (left_s := until_s - time.monotonic()) > 0:
            await trio.sleep(min(left_s, max(_LOOK_S, _WORTH * look_s)))
            if self.percentage and time.monotonic() < until_s:
                begun_s = time.monotonic()
                await self._tracer.run(self._halted.stop_more)
                look_s = time.monotonic() - begun_s

    async def _let_go(self, until_s: float) -> None:
        """The time after a slice."""
        while self.percentage:
            is_free = await self._tracer.run(self._halted.let_go)
            left_s = until_s - time.monotonic()
            if is_free or left_s <= 0:
                await trio.sleep(max(left_s, 0.0))
                return
            await trio.sleep(min(left_s, _LOOK_S))


class _Halted:
    """Whoever of a tree is stopped now; everything in the tracer's thread."""

    def __init__(self, root: HostPid) -> None:
        self._tree = FrozenTree(root)
        self._pids: list[HostPid] = []
        self._collector: Collector | None = None
        #: since when it stands still, or runs; None: it was not stopped yet
        self._since_s: float | None = None
        self._stands = False
        #: how long it took to stop it the last time, and how long it had run before
        self.cost_s = self.ran_s = 0.0
        #: how long it stood still, all slices together
        self.held_s = 0.0

    def stop(self) -> None:
        """Stop whoever runs."""
        begun_s = time.monotonic()
        self._pids = freeze.walk(self._tree.root)
        self.stop_more()
        now_s = time.monotonic()
        self.cost_s = now_s - begun_s
        self.ran_s = 0.0 if self._since_s is None else now_s - self._since_s
        self._since_s, self._stands = now_s, True

    def stop_more(self) -> None:
        """Stop whoever runs now of the processes that there were at `stop`."""
        if self._collector is None:
            self._collector = Collector()
        for pid in self._pids:
            with suppress(procfs.ProcessGone):
                self._stop_some(pid, self._collector)

    def _stop_some(self, pid: HostPid, collector: Collector) -> None:
        running = []
        for tid in procfs.tasks(pid):
            with suppress(procfs.ProcessGone):
                state = procfs.state(pid, tid)
                # "t": stopped by us when it had another number, before it executed a program
                if state in "Rt":
                    running.append(tid)
                elif state == "Z" and tid == pid:
                    _collect(tid)
        if running or pid in self._tree.processes:
            freeze.halt(self._tree, pid, running, collector, _STOP_S)

    def let_go(self) -> bool:
        """Let run on whoever has stopped; whether that was everybody."""
        self._end_slice()
        return freeze.release_nowait(self._tree)

    def _end_slice(self) -> None:
        if self._stands and self._since_s is not None:
            now_s = time.monotonic()
            self.held_s += now_s - self._since_s
            self._since_s, self._stands = now_s, False

    def release(self) -> None:
        """Let go of everybody; idempotent."""
        self._end_slice()
        self._since_s = None
        if self._collector is not None:
            collector, self._collector = self._collector, None
            for pid in freeze.walk(self._tree.root):
                with suppress(procfs.ProcessGone):
                    ours = [tid for tid in procfs.tasks(pid) if freeze.is_ours(tid)]
                    freeze.halt(self._tree, pid, ours, collector, _STOP_S)
            collector.close()
        freeze.release(self._tree)
        self._tree.processes.clear()


def _collect(tid: HostPid) -> None:
    """A first thread has ended, and was seized just before: its process can end only when we have heard of it."""
    if freeze.is_ours(tid):
        with suppress(ChildProcessError):
            ptrace.take_end(tid)
