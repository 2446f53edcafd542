"""Task state: puppets are given every kind of it, looked at, and compared with puppets rebuilt from the record."""

from __future__ import annotations

import os
import signal
import struct
from collections.abc import Iterator

import msgspec
import pytest

from pipeline.errors import RebuildError
from pipeline.image.schema import Process, Thread
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call, In, Out
from pipeline.remote.puppet import Puppet
from pipeline.resources.tasks import attributes, credentials, limits, refusals, scheduling, seccomp
from pipeline.resources.tasks.inquiry import Inquiry
from tests.resources.taskharness import (
    AREA,
    HOST,
    NESTS,
    RANGE,
    WITHOUT_0,
    Nest,
    launched,
    puppet_in,
    rebuild,
    record,
    threads_of,
)

pytestmark = pytest.mark.root
CAP_CHOWN, CAP_KILL, CAP_SYS_ADMIN, CAP_NET_RAW = 0, 5, 21, 13
RT = signal.SIGRTMIN
BPF_ALLOW = struct.pack("<HBBI", 0x06, 0, 0, 0x7FFF0000)


@pytest.fixture
def launcher() -> Iterator[Puppet]:
    with launched() as puppet:
        yield puppet


def prctl(*args: int | bytes) -> Call:
    return Call(NR.prctl, (*args, *[0] * (5 - len(args))), name=f"prctl{args}")


def info(number: int, code: int, pid: int, uid: int, value: int = 0) -> bytes:
    return struct.pack("<iiiiiIQ", number, 0, code, 0, pid, uid, value).ljust(128, b"\0")


def change_process(puppet: Puppet) -> None:
    """State of the whole process."""
    handler = struct.pack("<4Q", 0x1234_5000, 0x0400_0000 | 0x1000_0000, 0x1234_6000, 1 << 9)
    ignore = struct.pack("<4Q", 1, 0, 0, 0)
    puppet.run_checked(
        [
            Call(NR.rt_sigaction, (signal.SIGUSR1, handler, 0, 8)),
            Call(NR.rt_sigaction, (RT + 3, handler, 0, 8)),
            Call(NR.rt_sigaction, (signal.SIGHUP, ignore, 0, 8)),
            prctl(PRCTL.SET_CHILD_SUBREAPER, 1),
            prctl(PRCTL.SET_THP_DISABLE, 1),
            Call(NR.setitimer, (0, struct.pack("<4q", 7, 8, 1000, 9), 0)),
            Call(NR.setitimer, (2, struct.pack("<4q", 0, 0, 2000, 5), 0)),
            Call(NR.prlimit64, (0, 7, struct.pack("<2Q", 300, 400), 0)),
            Call(NR.prlimit64, (0, 11, struct.pack("<2Q", 0, 5000), 0)),
            Call(NR.prlimit64, (0, 1, struct.pack("<2Q", 1 << 20, 1 << 30), 0)),
        ]
    )
    with open(f"/proc/{puppet.pid}/oom_score_adj", "w") as file:
        file.write("321")
    with open(f"/proc/{puppet.pid}/coredump_filter", "w") as file:
        file.write("0x71")


def change_thread(puppet: Puppet, number: int) -> None:
    """State of one task, different for each `number`; it keeps its capabilities."""
    area = AREA + 65536 * (number + 1)
    puppet.run_checked(
        [
            prctl(PRCTL.SET_NAME, b"task (%d) \xff\0" % number),
            prctl(PRCTL.SET_TIMERSLACK, 70_000 + number),
            prctl(PRCTL.SET_PDEATHSIG, signal.SIGUSR2),
            Call(NR.personality, (0x0040000,)),
            Call(NR.set_tid_address, (area + 8,)),
            Call(NR.set_robust_list, (area + 64, 24)),
            Call(NR.rseq, (area + 128, 32, 0, 0x53053053)),
            Call(NR.sigaltstack, (struct.pack("<QI4xQ", area + 4096, 1 << 31, 32768), 0)),
            Call(NR.setpriority, (0, 0, 3 + number)),
            Call(NR.sched_setaffinity, (0, 8, struct.pack("<Q", 1 << number % 2))),
            Call(NR.ioprio_set, (1, 0, 2 << 13 | number)),
        ]
    )
    os.sched_setscheduler(puppet.tid, os.SCHED_IDLE if number else os.SCHED_BATCH, os.sched_param(0))


def queue(puppet: Puppet, uid: int) -> None:
    """Signals with every kind of sender, to the thread and, by the leader, to the process."""
    tgid, tid = puppet.pid, puppet.tid
    puppet.run_checked(
        [
            Call(
                NR.rt_tgsigqueueinfo, (tgid, tid, RT + 1, info(RT + 1, -1, tgid, uid, 0xDEAD_BEEF_0000_0001))
            ),
            Call(NR.rt_tgsigqueueinfo, (tgid, tid, RT + 1, info(RT + 1, -1, tgid, uid, 2))),
            Call(NR.rt_tgsigqueueinfo, (tgid, tid, signal.SIGSEGV, info(signal.SIGSEGV, 1, 0xABCDE, 0))),
        ]
    )
    if tid == tgid:
        puppet.run_checked(
            [
                Call(NR.rt_sigqueueinfo, (tgid, signal.SIGTERM, info(signal.SIGTERM, 0, tgid, uid))),
                Call(NR.rt_sigqueueinfo, (tgid, signal.SIGCHLD, info(signal.SIGCHLD, 1, 12345, uid, 7))),
                Call(NR.rt_sigqueueinfo, (tgid, signal.SIGURG, info(signal.SIGURG, 0x80, 0, 0))),
            ]
        )


def make_timer(puppet: Puppet, number: int, event: bytes, clock: int = 1) -> None:
    given = Out(4, struct.pack("<i", number))
    chooses = Call(NR.prctl, (PRCTL.TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0), may_fail=True)
    puppet.run([chooses])
    puppet.syscall(NR.timer_create, clock, event.ljust(64, b"\0"), given)
    if chooses.result == 0:
        puppet.syscall(NR.prctl, PRCTL.TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0)
    # where they cannot be chosen, they are given in order
    while (made := int.from_bytes(given.data, "little")) != number:
        puppet.syscall(NR.timer_delete, made)
        puppet.syscall(NR.timer_create, clock, event.ljust(64, b"\0"), given)


def make_timers(puppets: list[Puppet]) -> None:
    leader = puppets[0]
    make_timer(leader, 3, struct.pack("<Qiii", 0xABCD_0000_1234, RT + 4, 0, 0))
    make_timer(leader, 70, struct.pack("<Qiii", 5, RT + 5, 4, puppets[-1].tid), clock=0)
    make_timer(leader, 71, struct.pack("<Qiii", 5, 0, 1, 0), clock=2)
    leader.syscall(NR.timer_settime, 3, 0, struct.pack("<4q", 11, 12, 3000, 14), 0)
    leader.syscall(NR.timer_settime, 70, 0, struct.pack("<4q", 0, 0, 4000, 0), 0)


def change_credentials(puppet: Puppet, nest: Nest, number: int) -> None:
    """Ids and capabilities; the last thing that is changed."""
    permitted = 1 << CAP_CHOWN | 1 << CAP_KILL | 1 << CAP_NET_RAW | 1 << CAP_SYS_ADMIN
    kept = 1 << CAP_CHOWN | 1 << CAP_KILL
    calls = [prctl(PRCTL.CAPBSET_DROP, 30), prctl(PRCTL.CAPBSET_DROP, 31 + number)]
    if nest.setgroups == "allow":
        calls.append(Call(NR.setgroups, (3, struct.pack("<3I", 7, 70, 700))))
    calls.append(prctl(PRCTL.SET_SECUREBITS, 1 << 2 | 1 << 4))
    if nest is not WITHOUT_0:
        ids = [100 + number, 200 + number, 300 + number]
        calls += [
            Call(NR.setresgid, (10, 20, 30)),
            Call(NR.setresuid, tuple(ids)),
            Call(NR.setfsuid, (300 + number,)),
        ]
    calls += [
        credentials.capset(permitted, permitted, kept | 1 << CAP_NET_RAW),
        prctl(PRCTL.CAP_AMBIENT, 2, CAP_KILL),
        prctl(PRCTL.SET_NO_NEW_PRIVS, 1),
    ]
    puppet.run_checked(calls)


def comparable(process: Process) -> dict[str, object]:
    """The record without what must differ: pids, registers, and what a running timer has lost meanwhile."""
    changed = msgspec.structs.replace(
        process,
        pids=[1],
        itimers=[(interval, value // 30_000_000) for interval, value in process.itimers],
        timers=[
            msgspec.structs.replace(
                t, value_ns=t.value_ns // 30_000_000_000, thread=_place(process, t.thread)
            )
            for t in process.timers
        ],
        pending=[
            msgspec.structs.replace(p, pid=_place(process, p.pid), info=_info(process, p.info))
            for p in process.pending
        ],
        threads=[_comparable_thread(process, thread) for thread in process.threads],
    )
    result: dict[str, object] = msgspec.to_builtins(changed)
    return result


def _place(process: Process, pid: int | None) -> int | None:
    tids = [thread.pids[0] for thread in process.threads]
    return tids.index(pid) if pid in tids else pid


def _info(process: Process, raw: bytes) -> bytes:
    """The sender is the process itself in both: its pid is left out."""
    pid = struct.unpack_from("<i", raw, 16)[0]
    return raw[:16] + struct.pack("<i", 1 if pid == process.pids[0] else pid) + raw[20:]


def _comparable_thread(process: Process, thread: Thread) -> Thread:
    return msgspec.structs.replace(
        thread,
        pids=[1],
        registers=b"",
        xstate=b"",
        sigmask=0,
        pending=[
            msgspec.structs.replace(p, pid=_place(process, p.pid), info=_info(process, p.info))
            for p in thread.pending
        ],
    )


@pytest.mark.parametrize("nest", NESTS, ids=lambda nest: nest.name)
def test_everything_comes_back(launcher: Puppet, nest: Nest) -> None:
    with puppet_in(launcher, nest) as one, threads_of(one, 2) as source:
        for puppet in source:
            puppet.stop_with(signal.SIGWINCH)
        make_timers(source)
        for number, puppet in enumerate(source):
            change_thread(puppet, number)
            queue(puppet, nest.first)
        change_process(one)
        for number, puppet in enumerate(source):
            change_credentials(puppet, nest, number)
        one.run_checked([prctl(PRCTL.SET_DUMPABLE, 0), *[prctl(PRCTL.SET_PDEATHSIG, signal.SIGUSR2)]])
        process, space = record(source, nest)
    assert process.threads[0].comm == b"task (0) \xff"
    assert [t.id for t in process.timers] == [3, 70, 71]
    assert process.threads[1].credentials != process.threads[0].credentials
    assert len(process.pending) == 3
    with puppet_in(launcher, nest) as other, threads_of(other, 2) as destination:
        # the sender of its signals is the process itself, which has another pid in this test
        moved = _moved(process, destination)
        rebuild(moved, space, destination, nest)
        again, space_again = record(destination, nest)
    assert comparable(again) == comparable(process)
    assert space_again == space


def _moved(process: Process, puppets: list[Puppet]) -> Process:
    tids = {thread.pids[0]: puppet.tid for thread, puppet in zip(process.threads, puppets, strict=True)}

    def replaced(pending: list) -> list:
        return [
            msgspec.structs.replace(
                p,
                pid=tids.get(p.pid, p.pid),
                info=p.info[:16] + struct.pack("<i", tids.get(_pid(p.info), _pid(p.info))) + p.info[20:],
            )
            for p in pending
        ]

    return msgspec.structs.replace(
        process,
        pids=[puppets[0].pid],
        pending=replaced(process.pending),
        timers=[msgspec.structs.replace(t, thread=tids.get(t.thread, t.thread)) for t in process.timers],
        threads=[
            msgspec.structs.replace(thread, pids=[tids[thread.pids[0]]], pending=replaced(thread.pending))
            for thread in process.threads
        ],
    )


def _pid(raw: bytes) -> int:
    number: int = struct.unpack_from("<i", raw, 16)[0]
    return number


def test_ids_that_are_not_mapped_inside_are_set_from_outside(launcher: Puppet) -> None:
    """A task that entered before the map was written has ids that its own namespace has no number for."""
    nest = Nest("shifted", ((5, 100000, 10),))
    forest = nest.forest()

    def number(wanted: object, namespace: int) -> int | None:
        return forest.number_in(wanted, namespace, "uid")  # type: ignore[arg-type]

    with puppet_in(launcher, nest) as source:
        process, _ = record([source], nest)
    assert {i.id for i in process.threads[0].credentials.uids} == {0}
    with puppet_in(launcher, HOST) as keeper, puppet_in(launcher, HOST) as puppet:
        keeper.syscall(NR.unshare, 0x1000_0000)
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{keeper.pid}/{name}", "w") as file:
                file.write("5 100000 10")
        wanted = process.threads[0].credentials
        credentials.before_join(puppet, wanted, 0, number, number)
        fd = os.open(f"/proc/{keeper.pid}/ns/user", os.O_RDONLY)
        (inside,) = puppet.send_fds([fd])
        os.close(fd)
        puppet.syscall(NR.setns, inside, 0x1000_0000)
        puppet.run_checked(list(credentials.after_join(wanted, number, number, procfs.status(puppet.tid))))
        credentials.check_result(process.threads[0], puppet, number, number)


def test_groups_that_cannot_be_set_are_an_error(launcher: Puppet) -> None:
    with puppet_in(launcher, RANGE) as source:
        source.syscall(NR.setgroups, 1, struct.pack("<I", 5))
        process, space = record([source], RANGE)
    with puppet_in(launcher, Nest("denied", RANGE.lines, "deny")) as puppet:
        with pytest.raises(RebuildError, match="setgroups is denied"):
            rebuild(process, space, [puppet], RANGE)


def test_a_result_that_differs_is_an_error(launcher: Puppet) -> None:
    with puppet_in(launcher, HOST) as source:
        process, _ = record([source], HOST)
        source.run_checked([Call(NR.setgroups, (1, struct.pack("<I", 5)))])
        with pytest.raises(RebuildError, match="supplementary groups came out as"):
            credentials.check_result(process.threads[0], source, lambda i, _: i.id, lambda i, _: i.id)


# -- seccomp ---------------------------------------------------------------------------


def install(puppet: Puppet, program: bytes, flags: int = 0) -> int:
    fprog = In([len(program) // 8, In([program])])
    return puppet.syscall(NR.seccomp, 1, flags, fprog)


def forbid(number: int, action: int = 0x0005_0000) -> bytes:
    """Load the number; if it is `number`, answer `action` (errno 0), else allow."""
    return (
        struct.pack("<HBBI", 0x20, 0, 0, 0)
        + struct.pack("<HBBI", 0x15, 0, 1, number)
        + struct.pack("<HBBI", 0x06, 0, 0, action)
        + BPF_ALLOW
    )


def test_filters_come_back_in_order_and_stay_shared(launcher: Puppet) -> None:
    first, second = forbid(NR.getppid, 0x0005_0001), forbid(NR.getuid, 0x0005_0002)
    with puppet_in(launcher, HOST) as one, threads_of(one, 2) as source:
        install(one, first, 1)
        install(one, second, 1 | 2)
        process, space = record(source, HOST)
    assert [thread.seccomp.filters for thread in process.threads] == [[first, second]] * 2
    assert process.threads[1].seccomp.log == [False, True]
    with puppet_in(launcher, HOST) as other, threads_of(other, 2) as destination:
        rebuild(_moved(process, destination), space, destination, HOST)
        assert [procfs.status(p.tid).seccomp_filters for p in destination] == [2, 2]
        # a synchronization works only where all threads have one chain
        assert install(other, BPF_ALLOW, 1) == 0
        for puppet in destination:
            puppet._alive = True
            options_without_suspension(puppet)
            call = Call(NR.getppid)
            puppet.run([call])
            assert call.result == -1


def options_without_suspension(puppet: Puppet) -> None:
    from pipeline.kernel import ptrace
    from pipeline.kernel.ptrace import OPTION

    ptrace.set_options(puppet.tid, OPTION.EXITKILL)


def test_filters_of_one_thread_stay_its_own(launcher: Puppet) -> None:
    with puppet_in(launcher, HOST) as one, threads_of(one, 2) as source:
        install(source[1], forbid(NR.getppid))
        process, space = record(source, HOST)
    with puppet_in(launcher, HOST) as other, threads_of(other, 2) as destination:
        rebuild(_moved(process, destination), space, destination, HOST)
        assert [procfs.status(p.tid).seccomp_filters for p in destination] == [0, 1]


def test_a_filter_of_a_task_without_privileges_comes_back(launcher: Puppet) -> None:
    """Installed with CAP_SYS_ADMIN and without no_new_privs, then the capability was dropped."""
    with puppet_in(launcher, RANGE) as source:
        install(source, BPF_ALLOW)
        source.run_checked([credentials.capset(0, 0, 0)])
        process, space = record([source], RANGE)
    with puppet_in(launcher, RANGE) as puppet:
        rebuild(_moved(process, [puppet]), space, [puppet], RANGE)
        assert procfs.status(puppet.tid).seccomp_filters == 1
        assert not procfs.status(puppet.tid).no_new_privs


def test_supervised_filter_is_refused(launcher: Puppet) -> None:
    with puppet_in(launcher, HOST) as puppet:
        install(puppet, forbid(NR.getppid, 0x7FC0_0000))
        found = seccomp.seccomp(puppet.tid, procfs.status(puppet.tid))
        assert "supervisor" in str(next(seccomp.check_filters("it", found)))


# -- what this host cannot give --------------------------------------------------------


def test_hard_limits_that_cannot_be_raised_are_named() -> None:
    me = procfs.limits(procfs.HostPid(os.getpid()))
    too_much = [(soft, hard if number != 7 else hard + 1) for number, (soft, hard) in enumerate(me)]
    process = _empty(too_much)
    found = [str(blocker) for blocker in limits.check_limits([process])]
    capable = procfs.status(procfs.HostPid(os.getpid())).caps[2] >> 24 & 1
    assert bool(found) != bool(capable)
    if found:
        assert "hard limit nofile" in found[0]
    assert list(limits.check_limits([_empty(me)])) == []


def _empty(resource_limits: list[tuple[int, int]]) -> Process:
    from pipeline.image.schema import Memberships

    members = dict.fromkeys(Memberships.__struct_fields__, 0)
    return Process(
        pids=[5],
        parent=0,
        pgid=0,
        sid=0,
        state="running",
        namespaces=Memberships(**members),
        limits=resource_limits,
    )


def test_processors_that_are_not_here_are_named(launcher: Puppet) -> None:
    with puppet_in(launcher, HOST) as puppet:
        process, _ = record([puppet], HOST)
        assert process.threads[0].scheduling.affinity == []
        assert list(scheduling.check_processors(process)) == []
        bound = msgspec.structs.replace(process.threads[0].scheduling, affinity=[0, 4097])
        thread = msgspec.structs.replace(process.threads[0], scheduling=bound)
        found = list(scheduling.check_processors(msgspec.structs.replace(process, threads=[thread])))
        assert "processors [4097]" in str(found[0])


# -- refusals --------------------------------------------------------------------------


def refused(puppet: Puppet, own_users: bool = False) -> list[str]:
    inquiry = Inquiry(puppet.tid, puppet.tid == puppet.pid, procfs.timers(puppet.pid))
    puppet.run(inquiry.calls)
    if further := inquiry.further():
        puppet.run(further)
    found = inquiry.blockers(f"pid {puppet.pid}", own_users)
    stopped = refusals.check_stopped(puppet.pid, puppet.tid)
    return [str(b) for b in (*found, *stopped, *refusals.check_task(puppet.pid))]


def test_an_ordinary_task_is_not_refused(launcher: Puppet) -> None:
    with puppet_in(launcher, HOST) as puppet:
        assert refused(puppet) == []


@pytest.mark.parametrize(
    ("number", "arguments", "said"),
    [
        (
            NR.prctl,
            (PRCTL.SET_SYSCALL_USER_DISPATCH, 1, 0, 0xFFFF_FFFF_FFFF, 0),
            "PR_SET_SYSCALL_USER_DISPATCH",
        ),
        (NR.keyctl, (0, -1, 1), "thread keyring"),
        (NR.keyctl, (0, -2, 1), "process keyring"),
        (NR.modify_ldt, (0x11, struct.pack("<4I", 0, 0, 4, 1), 16), "local descriptor table"),
        (NR.timer_create, (3, struct.pack("<Qiii", 0, 34, 0, 0).ljust(64, b"\0"), Out(4)), ""),
    ],
    ids=["dispatch", "thread-keyring", "process-keyring", "ldt", "thread-timer-of-one"],
)
def test_states_that_only_the_task_knows(launcher: Puppet, number: int, arguments: tuple, said: str) -> None:
    with puppet_in(launcher, HOST) as puppet:
        # the dispatched range is all of it, so that our own calls pass
        puppet.syscall(number, *arguments)
        if number == NR.prctl and ptrace.get_syscall_user_dispatch(puppet.tid) is None:
            pytest.skip("this kernel does not tell it")
        found = refused(puppet)
        assert (said in "\n".join(found) and len(found) == 1) if said else not found


def test_who_might_dispatch_its_calls_is_named_where_the_kernel_cannot_tell(
    launcher: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ptrace, "get_syscall_user_dispatch", lambda _: None)
    restorer = 0x0400_0000
    with puppet_in(launcher, HOST) as puppet:
        assert refused(puppet) == []
        puppet.syscall(NR.rt_sigaction, signal.SIGSYS, struct.pack("<4Q", 0x1000, restorer, 0x1000, 0), 0, 8)
        (found,) = refused(puppet)
        assert "catches SIGSYS" in found


@pytest.mark.parametrize("registered", [(), (16,), (16, 256)])
def test_barriers_tell_whether_they_were_registered_where_the_kernel_does_not(
    launcher: Puppet, monkeypatch: pytest.MonkeyPatch, registered: tuple[int, ...]
) -> None:
    register_global, unknown_command = 4, 1 << 20
    monkeypatch.setattr(attributes, "_GET_REGISTRATIONS", unknown_command)
    with puppet_in(launcher, HOST) as puppet:
        for registration in registered:
            puppet.syscall(NR.membarrier, registration, 0, 0)
        inquiry = Inquiry(puppet.tid, True, procfs.timers(puppet.pid))
        puppet.run(inquiry.calls)
        puppet.run(inquiry.further())
        assert inquiry.of_memory()["membarrier"] == register_global + sum(registered)


def test_keys_in_keyrings_of_the_tree_are_named(launcher: Puppet) -> None:
    join_session, session, user = 1, -3, -4

    def add_key(puppet: Puppet, keyring: int, kind: bytes = b"user", size: int = 1) -> None:
        puppet.syscall(NR.add_key, kind + b"\0", b"a:%d\0" % size, b"x" * size, size, keyring)

    with puppet_in(launcher, HOST) as puppet:
        puppet.syscall(NR.keyctl, join_session, 0)
        assert refused(puppet, own_users=True) == []  # every login has one
        add_key(puppet, session)
        assert refused(puppet) == []
        add_key(puppet, session, b"logon")
        (found,) = refused(puppet)
        assert "key in its session keyring that is of type logon" in found
    with puppet_in(launcher, HOST) as puppet:
        puppet.syscall(NR.keyctl, join_session, 0)
        add_key(puppet, session, size=2000)
        (found,) = refused(puppet)
        assert "has 2000 bytes" in found
    with puppet_in(launcher, HOST) as puppet:
        puppet.syscall(NR.unshare, 0x1000_0000)
        assert refused(puppet, own_users=True) == []
        add_key(puppet, user)
        (found,) = refused(puppet, own_users=True)
        assert "uses the keyrings of its user (keys: 1)" in found
        assert refused(puppet) == []


def test_threads_that_are_apart_are_refused(launcher: Puppet) -> None:
    with puppet_in(launcher, HOST) as one, threads_of(one, 3) as threads:
        assert refused(one) == []
        for thread, kind in zip(threads[1:], (0x400, 0x0400_0000), strict=True):
            thread.syscall(NR.unshare, kind)
        one.syscall(NR.timer_create, 3, struct.pack("<Qiii", 0, 34, 0, 0).ljust(64, b"\0"), Out(4))
        text = "\n".join(refused(one))
        for said in (
            "descriptor table of its own",
            "other namespaces",
            "CLOCK_THREAD_CPUTIME_ID",
        ):
            assert said in text
