"""Pid namespaces: what there is to say of one besides its place, and of those that nobody lives in.

A pid namespace begins with its first process and ends with it: nothing can be born in it any
more, though a process may still have it chosen for its children, whose fork then fails with
ENOMEM. Between unshare(2) and the first fork there is one that nobody can see yet. Both are made
again in the process that chose them, last of all.

Source: pid_namespaces(7).
"""

from __future__ import annotations

from pipeline.image.schema import Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support

SUPPORT = Support(
    "pid",
    carried=(
        "any nesting, with the number of every level",
        "the one chosen for children, also without a first process or when that has ended",
    ),
    refused=(
        "one whose first process is not part of the tree",
        "one without a process that only a descriptor or a mount holds",
    ),
    shown_by=(
        "topologies/test_topologies.py",
        "programs/namespaced.py",
    ),
)


class PidState(Record, frozen=True, kw_only=True):
    """`ended`: its first process, and so everybody in it, is gone."""

    ended: bool = False


def choose_empty(state: PidState, puppet: Puppet) -> None:
    """Let `puppet` choose a new pid namespace for its children: one without a first process, or that has ended.

    Raises:
        OSError: EPERM: no CAP_SYS_ADMIN in its user namespace.
    """
    puppet.syscall(NR.unshare, CLONE.NEWPID)
    if state.ended:
        puppet.clone().kill_and_reap()
        puppet.reap_children()
