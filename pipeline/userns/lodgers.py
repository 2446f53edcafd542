"""Lodgers: children that sit in mount namespaces which nobody of the tree is in, so that /proc shows what is there.

A mount namespace can be held by a descriptor or by a mount of its file alone. Its mounts are listed for a process only,
and its files are reached through one. A lodger is that process: it joins, waits, and ends when it is told to or when
the pipeline does. It holds nothing of the pipeline's but the pipe that it waits at.

Source: setns(2), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
from itertools import pairwise
from types import TracebackType
from typing import Self

from pipeline.ids import HostPid
from pipeline.kernel.forking import fork_deaf, pipe
from pipeline.kernel.syscalls import PRCTL, prctl, setns
from pipeline.ledger import LEDGER
from pipeline.userns.visit import Way

_MOST_FDS = 1 << 20


class Lodgers:
    """The lodgers of one look at a tree, by what they are known as; a context manager that ends them."""

    def __init__(self) -> None:
        self._sitting: dict[int, tuple[HostPid, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._sitting:
            _, (pid, go) = self._sitting.popitem()
            os.close(go)
            os.waitpid(pid, 0)
            LEDGER.give_back("lodger", pid)

    def in_namespace(self, index: int, way: Way) -> HostPid:
        """Who sits in the mount namespace that is known as `index`; sent there by `way` when first asked for.

        Raises:
            OSError: it cannot be joined.
        """
        if index not in self._sitting:
            self._sitting[index] = _send(way)
            LEDGER.take("lodger", self._sitting[index][0])
        return self._sitting[index][0]


def _send(way: Way) -> tuple[HostPid, int]:
    """A child at the end of `way`, and the pipe that it waits at."""
    with pipe() as (told, tell):
        wait, go = os.pipe()
        try:
            try:
                pid = fork_deaf()
                if pid == 0:
                    _sit(way, wait, tell.fileno())
            finally:
                os.close(wait)
            tell.close()
            answer = told.read(4)
            if answer:
                os.waitpid(pid, 0)
                code = int.from_bytes(answer, "little")
                raise OSError(code, os.strerror(code))
        except BaseException:
            os.close(go)
            raise
    return HostPid(pid), go


def _sit(way: Way, wait: int, tell: int) -> None:
    """What the child does, by system calls only; never returns. It tells an errno, or nothing by closing the pipe."""
    try:
        for fd, kind in way:
            setns(fd, kind)
        prctl(PRCTL.SET_DUMPABLE, 1)  # joining a user namespace took it; who may look at it is asked of that
        for one, other in pairwise(sorted((2, wait, tell, _MOST_FDS))):
            os.closerange(one + 1, other)
        os.close(tell)
        os.read(wait, 1)
    except OSError as error:
        os.write(tell, (error.errno or 5).to_bytes(4, "little"))
    finally:
        os._exit(0)
