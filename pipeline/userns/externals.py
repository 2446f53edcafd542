"""External namespaces that are not the pipeline's own: given by a path, on either side.

What a tree shares with its surroundings is external: a dump does not carry it and a restore joins the
restorer's own. A tree that lives in a namespace of the host which somebody else keeps, such as
/run/netns/blue, can say so: `net=/run/netns/blue` at the dump makes that namespace the external one, and at the
destination the same option says which namespace takes its place there.

Source: namespaces(7), ip-netns(8).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from pipeline.errors import UsageError
from pipeline.ids import LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.syscalls import CLONE

#: kinds that can be given; mounts, pids and users of a tree are its own or the pipeline's
FLAGS: Mapping[str, CLONE] = {
    "net": CLONE.NEWNET, "uts": CLONE.NEWUTS, "ipc": CLONE.NEWIPC, "cgroup": CLONE.NEWCGROUP,
}  # fmt: skip

#: path of a namespace file by kind
Externals = Mapping[str, str]


def parse(texts: Iterable[str]) -> dict[str, str]:
    """``KIND=PATH`` of the command line.

    Raises:
        UsageError: not of that form, a kind that cannot be given, or given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        kind, equals, path = text.partition("=")
        if not equals or kind not in FLAGS or not path:
            raise UsageError(
                f"--external {text}: say KIND=PATH, such as net=/run/netns/blue ({', '.join(FLAGS)})"
            )
        if kind in found:
            raise UsageError(f"--external {text}: {kind} is given twice")
        found[kind] = path
    return found


@contextmanager
def opened(externals: Externals) -> Iterator[dict[str, LocalFd]]:
    """The given namespaces, open inside the block.

    Raises:
        UsageError: a path is not there, or is no namespace of its kind.
    """
    fds: dict[str, LocalFd] = {}
    try:
        for kind, path in externals.items():
            try:
                fds[kind] = LocalFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
                right = nsfs.kind_of(fds[kind]) == FLAGS[kind]
            except OSError as error:
                raise UsageError(f"--external {kind}={path}: {error.strerror}") from error
            if not right:
                raise UsageError(f"--external {kind}={path}: this is no {kind} namespace")
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)
