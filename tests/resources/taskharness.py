"""Puppets as source and destination of task state, in user namespaces of several kinds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.ids import RemoteAddress
from pipeline.image.schema import AddressSpace, Extent, Id, Memberships, Process, UserNamespace
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, PRCTL
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet, spawn_launcher
from pipeline.resources.tasks import credentials, signals, timers
from pipeline.resources.tasks.inquiry import Inquiry, thread_record
from pipeline.resources.tasks.reinstate import reinstate
from pipeline.userns.forest import Forest

SCRATCH = RemoteAddress(0x2000_0000_0000)
#: a page of the puppets' own, for areas that the kernel is told about
AREA = 0x3000_0000_0000
AREA_BYTES = 1 << 20
_THREAD = CLONE.VM | CLONE.FS | CLONE.FILES | CLONE.SIGHAND | CLONE.THREAD | CLONE.SYSVSEM


@dataclass(frozen=True)
class Nest:
    """A user namespace: its map lines (inner, outer, count), the same for uids and gids."""

    name: str
    lines: tuple[tuple[int, int, int], ...] = ()
    setgroups: str = "allow"

    @property
    def index(self) -> int:
        return 1 if self.lines else 0

    @property
    def first(self) -> int:
        return self.lines[0][0] if self.lines else 0

    def forest(self) -> Forest:
        namespaces = [UserNamespace(index=0)]
        if self.lines:
            extents = [Extent(*line) for line in self.lines]
            namespaces.append(
                UserNamespace(index=1, parent=0, owner=Id(0, 0), uid_map=extents, gid_map=extents)
            )
        return Forest(namespaces)


HOST = Nest("host")
RANGE = Nest("range", ((0, 100000, 65536),))
WITHOUT_0 = Nest("without-0", ((1000, 0, 1),), "deny")
NESTS = (HOST, RANGE, WITHOUT_0)


@contextmanager
def launched() -> Iterator[Puppet]:
    """A launcher; all that is cloned from it is killed with it."""
    puppet = spawn_launcher(SCRATCH, 900)
    try:
        yield puppet
    finally:
        puppet.kill_and_reap()
        puppet.stage.channel.close()
        assert not LEDGER.held()


@contextmanager
def puppet_in(launcher: Puppet, nest: Nest) -> Iterator[Puppet]:
    """A puppet in a new user namespace, with all capabilities there and an area for the kernel to write to."""
    child = launcher.clone_task(CLONE.PARENT)
    try:
        if nest.lines:
            child.syscall(NR.unshare, CLONE.NEWUSER)
            (Path(f"/proc/{child.pid}/setgroups")).write_text(nest.setgroups)
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{child.pid}/{name}").write_text(
                    "\n".join(" ".join(map(str, line)) for line in nest.lines)
                )
            if nest.first == 0:
                ids = Call(NR.setresgid, (0, 0, 0)), Call(NR.setresuid, (0, 0, 0))
                keep = Call(NR.prctl, (PRCTL.SET_SECUREBITS, 1 << 2 | 1 << 4, 0, 0, 0))
                child.run_checked([keep, *ids, Call(NR.prctl, (PRCTL.SET_SECUREBITS, 0, 0, 0, 0))])
        # a test's own child may be given any pending signal; its parent, pytest, must not learn of its end
        fixed = 0x100000 | 0x20 | 0x2
        child.syscall(NR.mmap, AREA, AREA_BYTES, 3, fixed, -1, 0)
        yield child
    finally:
        child.kill_and_reap()


@contextmanager
def threads_of(leader: Puppet, count: int) -> Iterator[list[Puppet]]:
    """The leader and `count` - 1 threads of it."""
    threads = [leader]
    try:
        threads += [leader.clone_task(_THREAD) for _ in range(count - 1)]
        yield threads
    finally:
        for thread in threads[1:]:
            thread.kill_and_reap()


def record(puppets: Sequence[Puppet], nest: Nest) -> tuple[Process, AddressSpace]:
    """What capture says of a process whose tasks are puppets."""
    pid = puppets[0].pid
    tids = {puppet.tid for puppet in puppets}

    def member(tid: int) -> int:
        return tid if tid in tids else 0

    inquiries = []
    for puppet in puppets:
        inquiry = Inquiry(puppet.tid, puppet.tid == pid, procfs.timers(pid))
        puppet.run(inquiry.calls)
        assert list(inquiry.blockers("it")) == []
        inquiries.append(inquiry)
    leader = inquiries[0]
    members = dict.fromkeys(Memberships.__struct_fields__, 0) | {"user": nest.index}
    process = Process(
        pids=[pid],
        parent=0,
        pgid=0,
        sid=0,
        state="running",
        namespaces=Memberships(**members),
        actions=leader.actions(),
        pending=signals.pending(pid, shared=True, member=member),
        limits=procfs.limits(pid),
        itimers=leader.itimers(),
        timers=leader.posix_timers(member),
        oom_score_adj=int(procfs.read_file(pid, "oom_score_adj")),
        child_subreaper=leader.child_subreaper(),
        threads=[thread_record(inquiry, nest.index, member) for inquiry in inquiries],
    )
    space = AddressSpace(
        space=1,
        vmas=[],
        exe=0,
        layout=[0] * 11,
        auxv=b"",
        dumpable=leader.dumpable(),
        thp_disable=leader.thp_disable(),
        coredump_filter=procfs.coredump_filter(pid),
    )
    return process, space


def rebuild(process: Process, space: AddressSpace, puppets: Sequence[Puppet], nest: Nest) -> list[bytes]:
    """Reinstate a process in puppets that are in its user namespace already."""
    forest = nest.forest()

    def uid(wanted: Id, namespace: int) -> int | None:
        return forest.number_in(wanted, namespace, "uid")

    def gid(wanted: Id, namespace: int) -> int | None:
        return forest.number_in(wanted, namespace, "gid")

    for thread, puppet in zip(process.threads, puppets, strict=True):
        credentials.before_join(puppet, thread.credentials, nest.index, uid, gid)
    timers.make_timers(process, puppets[0])
    return reinstate(process, space, puppets, uid, gid)
