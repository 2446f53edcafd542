"""Going into the surroundings that a restore has made around a tree, before it is dumped again.

Only a child can be born into a pid namespace: the command goes on in one, and this process waits for it, passes
signals on and ends with its status. Meanwhile it holds the first process of that namespace: with the tree
this would end too, and all that is in there, the command before it has said what it did. Killed, it lets go
of it, and takes the command with it.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from pipeline.cli.progress import Elsewhere
from pipeline.cli.render import say
from pipeline.errors import TargetError
from pipeline.ids import HostPid
from pipeline.kernel import ptrace
from pipeline.kernel.procfs import ProcessGone
from pipeline.kernel.syscalls import PRCTL, prctl
from pipeline.userns import around

_FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1)


class Place(NamedTuple):
    """Where a command goes on. `pid`: of the root, from there; `inside`: of surroundings that were entered."""

    pid: int
    inside: bool

    def path(self, path: str) -> str:
        """The name inside of what `path` names outside: `/` is another there, the working directory is the same."""
        if not self.inside or path == "-":
            return path
        if "://" in path:
            parts = urlsplit(path)
            if parts.scheme != "file" or parts.netloc not in {"", "localhost"}:
                return path
            path = unquote(parts.path)
        return os.path.relpath(os.path.realpath(path))


def enter(command: str, pid: int) -> Place:
    """Where `pid` has such surroundings, go on inside them; this process must have one thread.

    Returns:
        Where that is.

    Raises:
        Elsewhere: in the process that has waited for the command: with its status.
        TargetError: the surroundings end, or cannot be entered.
    """
    found = around.find(pid)
    if found is None:
        return Place(pid, False)
    child = None
    try:
        _hold(found.init)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))
        around.join(found.init)
        child = _fork()
        if child:
            _wait_and_exit(child)
    except OSError as error:
        raise TargetError(
            f"pid {pid}: the pid namespace that was made around its tree (its first process is {found.init}) "
            f"cannot be entered: {error}"
        ) from error
    finally:
        if child != 0:
            with suppress(ProcessLookupError):
                ptrace.detach(found.init)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    say(
        f"{command}: in the pid namespace that was made around its tree, pid {pid} is called {found.pid}, and so here"
    )
    return Place(found.pid, True)


def _fork() -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    os.close(reader if child else writer)
    if child == 0:
        prctl(PRCTL.SET_PDEATHSIG, signal.SIGKILL)
        os.set_blocking(reader, False)
        with suppress(BlockingIOError):
            os.read(reader, 1)
            os._exit(1)  # the one who waits is gone already
        os.close(reader)
    # the other end stays open as long as this process lives
    return child


def _wait_and_exit(child: int) -> None:
    from pipeline.run import wait

    code = os.waitstatus_to_exitcode(wait(HostPid(child), _FORWARDED))
    raise Elsewhere(code if code >= 0 else 128 - code)


def _hold(init: HostPid) -> None:
    """Let it stand still until it is detached, or this process is gone."""
    ptrace.seize(init)
    ptrace.interrupt(init)
    while (stop := ptrace.wait(init)) is not None and not stop.event:
        if stop.exited:
            raise ProcessGone(init)
        ptrace.cont(init, stop.signal)
