"""The first process of a pid namespace that is made around a tree (``--new-pidns``).

A pid namespace lives as long as its first process, and orphans become its children. So
it gets one that does nothing but collect the dead, and that ends with the root of the
tree, with its exit status: a few instructions (`pipeline.kernel.arch.x86_64.INIT`) in the
page of the puppet program. It lives in a mount namespace with a /proc of its own.

Source: pid_namespaces(7).
"""

from __future__ import annotations

import os

from pipeline.errors import RebuildError
from pipeline.ids import HostPid
from pipeline.kernel import ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.mountinfo import mountinfo
from pipeline.kernel.syscalls import CLONE, PRCTL
from pipeline.remote.puppet import Puppet

_MS_REC_PRIVATE = 0x4000 | 0x40000
#: what it is called
COMM = b"pipeline-init"
_FLAGS = {b"nosuid": 2, b"nodev": 4, b"noexec": 8}


def _flags_of_proc() -> int:
    """MS_NOSUID, NODEV and NOEXEC as our own /proc has them: what is a copy of it now, was one of such a /proc."""
    options = next((m.options for m in reversed(mountinfo(HostPid(os.getpid()))) if m.point == b"/proc"), ())
    return sum(flag for name, flag in _FLAGS.items() if name in options)


class Init:
    """A pid namespace and its first process, still a puppet.

    Args:
        launcher: in the namespace around it, with all capabilities in its user namespace.
    """

    def __init__(self, launcher: Puppet) -> None:
        maker = launcher.clone(CLONE.PARENT)
        try:
            maker.syscall(NR.unshare, CLONE.NEWPID | CLONE.NEWNS)
            self.puppet = maker.clone(CLONE.PARENT)
        finally:
            maker.kill_and_reap()
        try:
            self._set_up()
        except BaseException:
            self.puppet.kill_and_reap()
            raise

    def _set_up(self) -> None:
        puppet = self.puppet
        if puppet.syscall(NR.getpid) != 1:
            raise RebuildError("the first process of a new pid namespace is not its process 1")
        puppet.syscall(NR.mount, 0, b"/\0", 0, _MS_REC_PRIVATE, 0)
        puppet.syscall(NR.mount, b"proc\0", b"/proc\0", b"proc\0", _flags_of_proc(), 0)
        puppet.syscall(NR.prctl, PRCTL.SET_NAME, COMM + b"\0")

    def set_free(self, root: int, leaves_session: bool = True) -> None:
        """Let it run: it collects the dead until process `root` (a pid inside) ends.

        In a session of its own it outlives that of the restorer; but a job of a shell needs a parent in its session,
        or the kernel does not stop it (it would be orphaned).

        Nothing can be cloned from it any more.
        """
        puppet = self.puppet
        puppet.syscall(NR.close_range, puppet.stage.channel_fd, 0xFFFF_FFFF, 0)
        if leaves_session:
            puppet.syscall(NR.setsid)
        regs = arch.Registers(ptrace.get_regs(puppet.tid)).replace(
            rip=arch.PUPPET_INIT, rbp=root, orig_rax=-1
        )
        puppet.disown()
        ptrace.set_regs(puppet.tid, regs.pack())
        ptrace.set_sigmask(puppet.tid, 0)
        puppet.set_free()
