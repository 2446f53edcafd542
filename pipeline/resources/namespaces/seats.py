"""Who sits in which namespace that was made again, and how others join it.

Source: setns(2).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Namespace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.puppet import Puppet
from pipeline.resources.namespaces.flags import FLAGS
from pipeline.userns.visit import Way


def join(puppet: Puppet, keeper: Puppet, kind: str) -> None:
    """Move a puppet into the namespace of a kind that `keeper` is in, or has made for its children.

    Raises:
        RebuildError: setns is refused.
    """
    with Seats.opened(keeper, kind) as local:
        (number,) = puppet.send_fds([local])
    try:
        puppet.syscall(NR.setns, number, FLAGS[kind])
    except OSError as error:
        raise RebuildError(f"puppet {puppet.pid} may not join the {kind} namespace: {error}") from error
    finally:
        puppet.syscall(NR.close, number)


@dataclass
class Seats:
    """The keepers: `user` by `UserNamespace` index, the first being the launcher; `other` by `Namespace` index.

    `outside`: who is in the external pid and mount namespaces: those made around the tree, if there are some.
    """

    user: dict[int, Puppet]
    outside: Puppet
    other: dict[int, Puppet] = field(default_factory=dict)
    records: dict[int, Namespace] = field(default_factory=dict)

    def of(self, index: int, kind: str) -> Puppet:
        """The keeper of a namespace; raises RebuildError if it is none of this kind."""
        if index not in self.other or self.records[index].kind != kind:
            raise RebuildError(f"namespace {index} is no {kind} namespace of the tree")
        return self.other[index]

    def found(self, kind: str, index: int) -> Puppet | None:
        """Who is in a namespace of any kind, the external one's too; None while it is not made yet.

        Raises:
            RebuildError: the image has none of this kind with this number.
        """
        if kind == "user":
            if index not in self.user:
                raise RebuildError(f"the image has no user namespace {index}")
            return self.user[index]
        if index not in self.records or self.records[index].kind != kind:
            raise RebuildError(f"namespace {index} is no {kind} namespace of the image")
        if not self.records[index].external:
            return self.other.get(index)
        return self.outside if kind in {"pid", "mnt"} else self.user[0]

    @staticmethod
    @contextmanager
    def opened(seat: Puppet, kind: str) -> Iterator[LocalFd]:
        """The namespace of a kind that `seat` is in, or has made for its children, open inside the block."""
        link = "time_for_children" if kind == "time" else kind
        fd = LocalFd(os.open(f"/proc/{seat.pid}/ns/{link}", os.O_RDONLY | os.O_CLOEXEC))
        try:
            yield fd
        finally:
            os.close(fd)

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
