"""A grace period: behind it, no system call of a running tree is under way any more that was when it began.

A call that writes into memory may have pinned pages of it before they were write-protected: process_vm_writev(2) into
another process, a write to /proc/PID/mem, a read from a file whose file system brings its data straight there
(FUSE, 9p). What arrives in a pinned page marks nothing. So who has asked what was written, and protected it, reads it
when the calls of then are over: what they wrote is there, and who begins one later meets the protection.

Most tasks sleep in calls that pin nothing. Of the others it is enough to be stopped once, each by itself and for as
long as that takes: a stop is made on the way out of the kernel. What is asked of devices goes on behind a call
(`pipeline.resources.memory.devices`); and the calls of processes outside of the tree are not waited for.

Source: mm/process_vm_access.c; mm/memory.c, __access_remote_vm; Documentation/core-api/pin_user_pages.rst;
proc_pid_syscall(5).
"""

from __future__ import annotations

from contextlib import suppress

from pipeline.errors import TargetError
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.stages import freeze
from pipeline.stages.freeze import Collector, FrozenTree

#: how long a task may take to stop
_TIMEOUT_S = 10.0
#: calls that sleep with no page pinned: they copy to where they are told, if to anywhere, when they are awake again
_PINS_NOTHING = frozenset(
    {
        *(NR.nanosleep, NR.clock_nanosleep, NR.pause, NR.restart_syscall),
        *(NR.poll, NR.ppoll, NR.select, NR.pselect6, NR.epoll_wait, NR.epoll_pwait, NR.epoll_pwait2),
        *(NR.futex, NR.futex_wait, NR.futex_waitv, NR.semop, NR.semtimedop, NR.flock),
        *(NR.wait4, NR.waitid, NR.rt_sigsuspend, NR.rt_sigtimedwait, NR.vfork, NR.clone, NR.clone3),
        *(NR.accept, NR.accept4, NR.connect, NR.recvfrom, NR.recvmsg, NR.sendto, NR.sendmsg),
        *(NR.msgrcv, NR.msgsnd, NR.mq_timedreceive, NR.mq_timedsend, NR.io_getevents),
    }
)
#: nor do these, unless it is a file with a path that their first argument names
_OF_A_FILE = frozenset({NR.read, NR.readv, NR.write, NR.writev})


def wait(root: HostPid) -> None:
    """Let the system calls end in which tasks of the tree below `root` are now; in the tracer's thread.

    Whoever sleeps in one that pins nothing is not disturbed. Of the others each runs on before the next one is stopped,
    which it may be waiting for. Who may not be traced is passed over: a tree with such tasks cannot be carried.

    Raises:
        Refused: a task waits for a page in a call, and nobody brings it.
        TargetError: one does not stop.
    """
    with Collector() as collector:
        for pid in freeze.walk(root):
            with suppress(procfs.ProcessGone):
                for tid in procfs.tasks(pid):
                    with suppress(procfs.ProcessGone):
                        if not _pins_nothing(tid):
                            _stop_once(pid, tid, collector)


def _stop_once(pid: HostPid, tid: HostPid, collector: Collector) -> None:
    tree = FrozenTree(pid)
    try:
        freeze.halt(tree, pid, [tid], collector, _TIMEOUT_S)
        if not all(task.stopped for process in tree.living() for task in process.tasks.values()):
            raise TargetError(f"pid {pid} thread {tid} does not stop: it stays in a system call")
    finally:
        freeze.release(tree)


def _pins_nothing(tid: HostPid) -> bool:
    """Whether a task is seen asleep, and where: in a harmless call, or in none (-1), as in a page fault of its own."""
    try:
        words = procfs.read_file(tid, "syscall").split()
        if words[0] == b"running":
            return False
        number = int(words[0])
        if number in _OF_A_FILE:
            return not procfs.read_link(tid, f"fd/{int(words[1], 16)}").startswith(b"/")
    except procfs.ProcessGone:
        raise
    except OSError:  # this kernel does not tell; or it was closed, or may not be looked at
        return False
    return number == -1 or number in _PINS_NOTHING
