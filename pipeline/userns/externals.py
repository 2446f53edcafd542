"""What is outside of a tree and takes part in it: namespaces, and devices that a network of the tree hangs on.

What a tree shares with its surroundings is external: a dump does not carry it and a restore joins the
restorer's own. A tree that lives in a namespace of the host which somebody else keeps, such as
/run/netns/blue, can say so: `net=/run/netns/blue` at the dump makes that namespace the external one, and at the
destination the same option says which namespace takes its place there.

A device of a network of the tree may hang on one outside: a veth pair has its other end there, a macvlan device lies
on another one. What that shall be is said at the destination only: `veth:eth0=PEER@BRIDGE`, `macvlan:eth0=LOWER`.
Where two networks of the tree have a device of that name, the number of the network's namespace stands before it:
`veth:8/eth0=PEER`.

Source: namespaces(7), ip-netns(8), veth(4).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import msgspec

from pipeline.errors import UsageError
from pipeline.ids import LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.syscalls import CLONE

#: kinds that can be given; mounts, pids and users of a tree are its own or the pipeline's
FLAGS: Mapping[str, CLONE] = {
    "net": CLONE.NEWNET, "uts": CLONE.NEWUTS, "ipc": CLONE.NEWIPC, "cgroup": CLONE.NEWCGROUP,
}  # fmt: skip
#: kinds of devices that may hang on one outside, and how that is said
DEVICES: Mapping[str, str] = {"veth": "PEER[@BRIDGE]", "macvlan": "LOWER", "macvtap": "LOWER"}

#: the path of a namespace file by kind, and what a device hangs on by `KIND:NAME`
Externals = Mapping[str, str]

_NAME = r"[^/:@=\s]{1,15}"
_DEVICE = re.compile(rf"(?P<kind>\w+):(?:(?P<network>\d{{1,8}})/)?(?P<name>{_NAME})")
_OTHER = re.compile(rf"(?P<other>{_NAME})(?:@(?P<bridge>{_NAME}))?")


class GivenDevice(msgspec.Struct, frozen=True):
    """What a device of the tree shall hang on.

    Args:
        kind, name: of the device of the tree.
        network: the `Namespace` index of its network; None: the only one that has it.
        other: the name of the device outside.
        bridge: what that one is put under.
    """

    kind: str
    name: str
    network: int | None
    other: str
    bridge: str | None = None

    def __str__(self) -> str:
        where = "" if self.network is None else f"{self.network}/"
        under = "" if self.bridge is None else f"@{self.bridge}"
        return f"--external {self.kind}:{where}{self.name}={self.other}{under}"


def parse(texts: Iterable[str]) -> dict[str, str]:
    """``KIND=PATH`` and ``KIND:NAME=OTHER`` of the command line.

    Raises:
        UsageError: not of that form, a kind that cannot be given, or given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        what, equals, where = text.partition("=")
        device = what.partition(":")[0] in DEVICES and ":" in what
        if not equals or not where or not (device or what in FLAGS):
            forms = ", ".join(f"{kind}:NAME={other}" for kind, other in DEVICES.items())
            raise UsageError(
                f"--external {text}: say KIND=PATH, such as net=/run/netns/blue ({', '.join(FLAGS)}), or {forms}"
            )
        if what in found:
            raise UsageError(f"--external {text}: {what} is given twice")
        found[what] = where
    given_devices(found)
    return found


def given_namespaces(externals: Externals) -> dict[str, str]:
    """Those that are namespaces."""
    return {kind: path for kind, path in externals.items() if ":" not in kind}


def given_devices(externals: Externals) -> list[GivenDevice]:
    """Those that are devices.

    Raises:
        UsageError: one is not of the form that its kind has, or two are to have the same name outside.
    """
    found: list[GivenDevice] = []
    for what, where in externals.items():
        if ":" not in what:
            continue
        device, other = _DEVICE.fullmatch(what), _OTHER.fullmatch(where)
        kind = device["kind"] if device else ""
        if not device or not other or kind not in DEVICES or (other["bridge"] and "@" not in DEVICES[kind]):
            form = DEVICES.get(what.partition(":")[0], "OTHER")
            raise UsageError(
                f"--external {what}={where}: say KIND:NAME={form} with names of devices, at most 15 characters each"
            )
        network = int(device["network"]) if device["network"] else None
        found.append(GivenDevice(kind, device["name"], network, other["other"], other["bridge"]))
    made = [given.other for given in found if given.kind == "veth"]
    for given in found:
        if given.kind == "veth" and made.count(given.other) > 1:
            raise UsageError(f"{given}: another one is to be called {given.other}, too")
    return found


@contextmanager
def opened(externals: Externals) -> Iterator[dict[str, LocalFd]]:
    """The given namespaces, open inside the block.

    Raises:
        UsageError: a path is not there, or is no namespace of its kind; a device is given.
    """
    fds: dict[str, LocalFd] = {}
    try:
        for kind, path in externals.items():
            if kind not in FLAGS:
                raise UsageError(
                    f"--external {kind}={path}: what a device hangs on is said at the destination, to restore or serve"
                )
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
