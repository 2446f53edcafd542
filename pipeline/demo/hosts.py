"""A host of the demo, from the outside: made by `pipeline.run`, spoken to over two pipes.

Namespaces of its own: pid, mount, network, uts and ipc. What it does not have of its
own is the file system below: the two hosts share it, as if by network storage.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from pipeline import run
from pipeline.errors import PipelineError
from pipeline.kernel.syscalls import CLONE

_KINDS = CLONE.NEWPID | CLONE.NEWNS | CLONE.NEWNET | CLONE.NEWUTS | CLONE.NEWIPC


class Host:
    """A host; a context manager that ends it and everything on it.

    Args:
        name: its host name.
        inherited: descriptors that its process 1 gets under the same numbers.
    """

    def __init__(self, name: str, inherited: tuple[int, ...] = ()) -> None:
        self.name = name
        self._inherited = inherited
        self.pid = 0
        self._requests = self._replies = -1

    def __enter__(self) -> Self:
        request_reader, self._requests = os.pipe()
        self._replies, reply_writer = os.pipe()
        kept = {0: os.dup(0), 1: os.dup(1)}
        try:
            # run.start hands on descriptors 0, 1, 2 as they are
            os.dup2(request_reader, 0)
            os.dup2(reply_writer, 1)
            for fd in self._inherited:
                os.set_inheritable(fd, True)
            command = [sys.executable, "-m", "pipeline.demo.host", self.name, *map(str, self._inherited)]
            self.pid = run.start(command, run.Surroundings(others=_KINDS))
        finally:
            for fd, copy in kept.items():
                os.dup2(copy, fd)
                os.close(copy)
            for fd in self._inherited:
                os.set_inheritable(fd, False)
            os.close(request_reader)
            os.close(reply_writer)
            if not self.pid:
                self._close()
        try:
            self._reply()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            # returns when every process of its pid namespace is gone
            os.waitpid(self.pid, 0)
            self.pid = 0
        self._close()

    def _close(self) -> None:
        for fd in (self._requests, self._replies):
            if fd >= 0:
                os.close(fd)
        self._requests = self._replies = -1

    def _reply(self) -> Any:
        data = b""
        while not data.endswith(b"\n"):
            piece = os.read(self._replies, 1 << 16)
            if not piece:
                raise PipelineError(f"{self.name} ended unexpectedly")
            data += piece
        reply = json.loads(data)
        if "error" in reply:
            raise PipelineError(f"{self.name}: {reply['error']}")
        return reply["answer"]

    def ask(self, request: str, **arguments: Any) -> Any:
        """Make a request (see `pipeline.demo.host.Agent`) and wait for the answer.

        Raises:
            PipelineError: the host says why it could not.
        """
        data = json.dumps({"do": request, **arguments}).encode() + b"\n"
        while data:
            data = data[os.write(self._requests, data) :]
        return self._reply()
