"""Kinds of namespaces in the order in which external ones are numbered, and the flag of clone(2) for each."""

from __future__ import annotations

from pipeline.image.schema import NamespaceKind
from pipeline.kernel.syscalls import CLONE

KINDS: tuple[NamespaceKind, ...] = ("pid", "mnt", "uts", "ipc", "net", "cgroup", "time")
FLAGS = {
    "pid": CLONE.NEWPID, "mnt": CLONE.NEWNS, "uts": CLONE.NEWUTS, "ipc": CLONE.NEWIPC,
    "net": CLONE.NEWNET, "cgroup": CLONE.NEWCGROUP, "time": CLONE.NEWTIME, "user": CLONE.NEWUSER,
}  # fmt: skip
