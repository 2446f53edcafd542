"""Who sits in which namespace that was made again, and how others join it.

Source: setns(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pipeline.errors import RebuildError
from pipeline.image.schema import Namespace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.puppet import Puppet
from pipeline.resources.namespaces.members import FLAGS
from pipeline.userns.visit import Way


def join(puppet: Puppet, keeper: Puppet, kind: str) -> None:
    """Move a puppet into the namespace of a kind that `keeper` is in, or has made for its children.

    Raises:
        RebuildError: setns is refused.
    """
    link = "time_for_children" if kind == "time" else kind
    local = os.open(f"/proc/{keeper.pid}/ns/{link}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        (number,) = puppet.send_fds([local])
    finally:
        os.close(local)
    try:
        puppet.syscall(NR.setns, number, FLAGS[kind])
    except OSError as error:
        raise RebuildError(f"puppet {puppet.pid} may not join the {kind} namespace: {error}") from error
    finally:
        puppet.syscall(NR.close, number)


@dataclass
class Seats:
    """The keepers: `user` by `UserNamespace` index, the first being the launcher; `other` by `Namespace` index."""

    user: dict[int, Puppet]
    other: dict[int, Puppet] = field(default_factory=dict)
    records: dict[int, Namespace] = field(default_factory=dict)

    def of(self, index: int, kind: str) -> Puppet:
        """The keeper of a namespace; raises RebuildError if it is none of this kind."""
        if index not in self.other or self.records[index].kind != kind:
            raise RebuildError(f"namespace {index} is no {kind} namespace of the tree")
        return self.other[index]

    @contextmanager
    def way_into(self, index: int) -> Iterator[Way]:
        """The way of a visitor that acts in a namespace with the ids of its owner; see `pipeline.userns.visit`."""
        record = self.records[index]
        with ExitStack() as fds:
            way = []
            for kind, keeper in (("user", self.user[record.owner]), (record.kind, self.other[index])):
                if kind != "user" or record.owner:
                    fd = os.open(f"/proc/{keeper.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
                    fds.callback(os.close, fd)
                    way.append((fd, int(FLAGS[kind])))
            yield way
