"""Puppets: the processes a tree is rebuilt from.

A puppet is a process of a few hundred bytes of code that never runs a line of its own:
it stands in a ptrace stop, and we run tables of system calls inside it until it has
become the process it shall be. The first one, the launcher, is spawned from a memfd;
all others are clones of puppets, so each has the parent, the credentials and the
namespaces that it was cloned with.

Guarantees: a puppet dies with its tracer (PTRACE_O_EXITKILL) until `disown`; it rests
in a signal-delivery or event stop, never in a system call; every puppet is entered in
the ledger before it exists and struck out when it is killed or set free.

While it is a puppet, all signals but the one it stops with are blocked.
Source: ptrace(2), clone3 in clone(2), and the facts in docs/engine.md.
"""

from __future__ import annotations

import array
import errno
import os
import signal
import socket
import struct
import time
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field

from pipeline.errors import RebuildError
from pipeline.ids import HostPid, RemoteAddress
from pipeline.kernel import procfs, ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.kernel.ptrace import EVENT, OPTION
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Argument, Call, In, Out, lay_out, take_results

SCRATCH_BYTES = 512 * 1024
_CODE_BYTES = 4096
#: a batch is cut here so that table and data fit into the scratch mapping
_BATCH_CALLS = 512
_BATCH_DATA_BYTES = SCRATCH_BYTES - _CODE_BYTES - _BATCH_CALLS * 64 * 2
_SCM_MAX_FDS = 253
_OPTIONS = OPTION.TRACEFORK | OPTION.TRACEVFORK | OPTION.TRACECLONE | OPTION.TRACEEXEC
_ALL_SIGNALS = 0xFFFF_FFFF_FFFF_FFFF
_AT_EMPTY_PATH = 0x1000
_END_PAUSE_S = 0.0002
#: how long we wait for the ends of who was killed by its own tree; parents hear of later ones when our thread ends
_PASSED_OVER_S = 1.0


@dataclass
class Stage:
    """What all puppets of one rebuild share.

    Args:
        scratch: address of the scratch mapping, free in every layout of the tree.
        channel: our end of the socket that descriptors are sent through.
        channel_fd: number of its other end in every puppet, the first of its own, see
            `pipeline.image.numbers.puppet_descriptors`: the next is the puppet program, then comes what tells the
            kernel the next pid (`pipeline.remote.births`).
        reserved: pids that only processes of the tree may have, a set per pid namespace level.
        calls: how many system calls were run inside puppets.
        alive: every puppet that has not ended or been set free, in the order of birth: whatever becomes of
            the caller of a clone, nobody is lost.
    """

    scratch: RemoteAddress
    channel: socket.socket
    channel_fd: int
    reserved: Sequence[AbstractSet[int]] = ()
    calls: int = field(default=0)
    alive: dict[HostPid, Puppet] = field(default_factory=dict)

    def end(self, keep: Collection[HostPid] = ()) -> None:
        """End every puppet but those to `keep`, the last born first: children before their parents; idempotent."""
        for tid, puppet in reversed(list(self.alive.items())):
            if tid not in keep:
                puppet.kill_and_reap()


class Puppet:
    """One stopped task of a half-built tree. See `Remote` for `run` and `syscall`.

    Args:
        stage: what it shares with the others.
        tid: the task; `pid` is its process.
    """

    def __init__(self, stage: Stage, tid: HostPid, pid: HostPid) -> None:
        self.stage = stage
        self.tid = tid
        self.pid = pid
        self.stop_signal: int = signal.SIGURG
        self._stub = RemoteAddress(stage.scratch)
        self._table = RemoteAddress(stage.scratch + _CODE_BYTES)
        self._memory: int | None = None
        self._new_tasks: list[int] = []
        LEDGER.take("puppet", tid)
        stage.alive[tid] = self

    def __repr__(self) -> str:
        return f"<Puppet {self.tid}>"

    # -- memory ---------------------------------------------------------------

    @property
    def memory(self) -> int:
        """Descriptor of /proc/PID/mem, which ignores protections; owned by the puppet."""
        if self._memory is None:
            self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        return self._memory

    def _forget_memory(self) -> None:
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None

    # -- system calls -----------------------------------------------------------

    def syscall(self, number: int, *args: Argument) -> int:
        """Run one system call; OSError with its errno if it fails."""
        call = Call(number, args)
        self.run([call])
        return call.check()

    def run(self, calls: Sequence[Call]) -> None:
        """Run the calls in order; failing ones do not stop the rest (see `Call.check`)."""
        start = 0
        while start < len(calls):
            end, size = start, 0
            while end < len(calls) and end - start < _BATCH_CALLS:
                size += _data_bytes(calls[end])
                if end > start and size > _BATCH_DATA_BYTES:
                    break
                end += 1
            self._run_batch(calls[start:end])
            start = end

    def run_checked(self, calls: Sequence[Call]) -> None:
        """Run the calls and raise OSError for the first that failed."""
        self.run(calls)
        for call in calls:
            call.check()

    def _run_batch(self, calls: Sequence[Call]) -> None:
        layout = lay_out(calls, self._table)
        if len(layout.image) > SCRATCH_BYTES - _CODE_BYTES:
            raise ValueError(f"a batch of {len(layout.image)} bytes does not fit into the scratch mapping")
        _write_all(self.memory, layout.image, self._table)
        regs = arch.Registers(ptrace.get_regs(self.tid)).replace(
            rip=self._stub, rbx=self._table, r12=len(calls), r13=self.stop_signal, orig_rax=-1
        )
        ptrace.set_regs(self.tid, regs.pack())
        ptrace.cont(self.tid)
        self._await_stop_signal()
        answer = os.pread(self.memory, len(layout.image), self._table)
        take_results(calls, layout, answer)
        self.stage.calls += len(calls)

    def _await_stop_signal(self) -> None:
        while True:
            stop = ptrace.wait(self.tid)
            if stop is None or stop.exited:
                raise RebuildError(f"puppet {self.tid} died (status {stop.status if stop else 0:#x})")
            if not stop.event and stop.signal == self.stop_signal:
                return
            if stop.event in (EVENT.FORK, EVENT.VFORK, EVENT.CLONE):
                self._new_tasks.append(ptrace.event_message(self.tid))
            elif not stop.event and stop.signal in (
                signal.SIGSEGV,
                signal.SIGILL,
                signal.SIGBUS,
                signal.SIGSYS,
            ):
                name = signal.Signals(stop.signal).name
                raise RebuildError(f"puppet {self.tid} got {name} while running system calls")
            ptrace.cont(self.tid)

    def _await_event_stop(self) -> None:
        """Bring a task that was just seized, cloned or executed into a plain EVENT_STOP."""
        while True:
            stop = ptrace.wait(self.tid)
            if stop is None or stop.exited:
                raise RebuildError(f"puppet {self.tid} died at its start")
            if stop.event == EVENT.STOP:
                return
            ptrace.interrupt(self.tid)
            ptrace.cont(self.tid)

    # -- making more --------------------------------------------------------------

    def clone(self, flags: int = 0, *, set_tid: Sequence[int] = (), exit_signal: int = 0) -> Puppet:
        """Clone a helper: a puppet that is no process of the tree and takes none of its pids.

        Its end notifies nobody, unless told so; a parent collects it with __WALL (see `pipeline.remote.births`).

        Args:
            flags: CLONE_*; with CLONE_PARENT the helper is a sibling.
            set_tid: pids by level, innermost first, for as many levels as the puppet may choose.
            exit_signal: what its parent gets at its end, and at that of the siblings it clones.
        """
        missed: list[Puppet] = []
        try:
            while True:
                helper = self.clone_task(flags, set_tid=set_tid, exit_signal=exit_signal)
                seen = seen_pids(helper.tid)
                if not any(pid in taken for pid, taken in zip(seen, self.stage.reserved, strict=False)):
                    return helper
                missed.append(helper)  # holds the number until another one is found
        finally:
            for helper in missed:
                helper.kill_and_reap()
            if missed and not flags & CLONE.PARENT:
                self.reap_children()

    def clone_task(
        self,
        flags: int = 0,
        *,
        set_tid: Sequence[int] = (),
        exit_signal: int = 0,
        child_tid: int = 0,
    ) -> Puppet:
        """clone3 inside the puppet; the new task is a puppet too.

        Args:
            flags: CLONE_*; with CLONE_PARENT the new process is a sibling, with CLONE_THREAD a thread.
            set_tid: as for `clone`.
            exit_signal: what the parent gets at its end. The kernel ignores it with CLONE_PARENT (the
                creator's counts) and execve makes it SIGCHLD.
            child_tid: clear_child_tid address for CLONE_CHILD_CLEARTID.

        Raises:
            OSError: EEXIST: a pid is taken; EPERM: a level that the puppet may not choose in.
        """
        if flags & (CLONE.PARENT | CLONE.THREAD):
            exit_signal = 0
        pids: int | In = In([struct.pack(f"<{len(set_tid)}i", *set_tid)]) if set_tid else 0
        wanted = In([flags, 0, child_tid, 0, exit_signal, 0, 0, 0, pids, len(set_tid), 0])
        self._new_tasks.clear()
        self.syscall(arch.NR.clone3, wanted, 88)
        tid = HostPid(self._new_tasks.pop())
        child = Puppet(self.stage, tid, self.pid if flags & CLONE.THREAD else tid)
        child._stub, child._table = self._stub, self._table
        child._await_event_stop()
        ptrace.set_options(tid, _OPTIONS | OPTION.EXITKILL)
        ptrace.set_sigmask(tid, _ALL_SIGNALS & ~(1 << (child.stop_signal - 1)))
        return child

    def exec_puppet(self) -> None:
        """Execute the puppet program anew: a fresh address space that belongs to the current user namespace."""
        program = self.stage.channel_fd + 1
        call = Call(arch.NR.execveat, (program, b"\0", In([In([b"puppet\0"]), 0]), In([0]), _AT_EMPTY_PATH))
        layout = lay_out([call], self._table)
        _write_all(self.memory, layout.image, self._table)
        regs = arch.Registers(ptrace.get_regs(self.tid)).replace(
            rip=self._stub, rbx=self._table, r12=1, r13=self.stop_signal, orig_rax=-1
        )
        ptrace.set_regs(self.tid, regs.pack())
        ptrace.cont(self.tid)
        stop = ptrace.wait(self.tid)
        if stop is None or stop.exited:
            raise RebuildError(f"puppet {self.tid} died in execve")
        if stop.event != EVENT.EXEC:
            answer = os.pread(self.memory, 64, self._table)
            take_results([call], layout, answer.ljust(len(layout.image), b"\0"))
            call.check()
            raise RebuildError(f"puppet {self.tid} stopped with {stop.status:#x} in execve")
        self._forget_memory()
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        self._await_event_stop()
        self._set_up_scratch()

    def _set_up_scratch(self) -> None:
        """Map the scratch area and move there; the puppet has just been executed."""
        regs = arch.Registers(ptrace.get_regs(self.tid))
        self._stub = RemoteAddress(arch.PUPPET_STUB)
        self._table = RemoteAddress((regs["rsp"] - 8192) & ~63)
        private_anonymous_fixed = 0x100000 | 0x20 | 0x2
        self.syscall(arch.NR.mmap, self.stage.scratch, SCRATCH_BYTES, 7, private_anonymous_fixed, -1, 0)
        _write_all(self.memory, arch.STUB, self.stage.scratch)
        self._stub = RemoteAddress(self.stage.scratch)
        self._table = RemoteAddress(self.stage.scratch + _CODE_BYTES)

    # -- descriptors --------------------------------------------------------------

    def send_fds(self, fds: Sequence[int]) -> list[int]:
        """Give duplicates of our descriptors to the puppet; they land at its lowest free numbers, in order."""
        numbers: list[int] = []
        for start in range(0, len(fds), _SCM_MAX_FDS):
            chunk = fds[start : start + _SCM_MAX_FDS]
            socket.send_fds(self.stage.channel, [b"f"], chunk)
            room = 16 + 4 * len(chunk)
            control = Out((room + 7) & ~7)
            vector = In([Out(8), 1])
            message = In([0, 0, vector, 1, control, room, 0])
            self.syscall(arch.NR.recvmsg, self.stage.channel_fd, message, socket.MSG_CMSG_CLOEXEC)
            length, level, kind = struct.unpack_from("<Qii", control.data)
            if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS) or length != room:
                raise RebuildError(
                    f"puppet {self.tid} received {max(length - 16, 0) // 4} of {len(chunk)} descriptors"
                )
            numbers.extend(array.array("i", control.data[16 : 16 + 4 * len(chunk)]))
        return numbers

    # -- becoming a program ----------------------------------------------------------

    def suspend_seccomp(self) -> None:
        """Let no seccomp filter see the calls run from here on (CAP_SYS_ADMIN in the initial user namespace)."""
        ptrace.set_options(self.tid, _OPTIONS | OPTION.EXITKILL | OPTION.SUSPEND_SECCOMP)

    def stop_with(self, number: int) -> None:
        """From here on the puppet stops itself with signal `number`, the only one that is not blocked."""
        self.stop_signal = number
        ptrace.set_sigmask(self.tid, _ALL_SIGNALS & ~(1 << (number - 1)))

    def fall_asleep(self, call: Call) -> int:
        """Run a system call that sleeps, and interrupt it at once; the puppet rests in an event stop.

        The interruption is asked for at the entry of the call, so it finds every sleeper asleep, and a
        call that has nothing to wait for at its end.

        Returns:
            The raw result: -516 where the kernel now holds a restart block for the call. It holds it
            until another call that sleeps replaces it.
        """
        layout = lay_out([call], self._table)
        _write_all(self.memory, layout.image, self._table)
        regs = arch.Registers(ptrace.get_regs(self.tid)).replace(
            rip=self._stub, rbx=self._table, r12=1, r13=self.stop_signal, orig_rax=-1
        )
        ptrace.set_regs(self.tid, regs.pack())
        ptrace.cont_to_syscall(self.tid)
        stop = ptrace.wait(self.tid)
        while stop is not None and stop.event:
            ptrace.cont_to_syscall(self.tid)
            stop = ptrace.wait(self.tid)
        if stop is None or stop.exited or stop.signal != signal.SIGTRAP:
            raise RebuildError(f"puppet {self.tid} did not come to its last call")
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        self._await_event_stop()
        self.stage.calls += 1
        return arch.Registers(ptrace.get_regs(self.tid)).syscall_result

    def stop_group(self, others: Sequence[Puppet], number: int) -> bool:
        """Stop the whole process by job control; its parent is told. Calls can be run in it all the same.

        When it is set free it stands still, and nobody is told again.

        Args:
            others: the other threads of the process.
            number: the signal that it was stopped with.

        Returns:
            False if this signal does not stop it (its process group is orphaned); nothing has happened then.
        """
        call = Call(arch.NR.getpid)  # what it does if it is not stopped
        _write_all(self.memory, lay_out([call], self._table).image, self._table)
        regs = arch.Registers(ptrace.get_regs(self.tid)).replace(
            rip=self._stub, rbx=self._table, r12=1, r13=self.stop_signal, orig_rax=-1
        )
        ptrace.set_regs(self.tid, regs.pack())
        stops = 1 << (self.stop_signal - 1)
        ptrace.set_sigmask(
            self.tid, _ALL_SIGNALS & ~stops & ~(1 << (number - 1))
        )  # blocked, it would be queued
        os.kill(self.pid, signal.SIGSTOP)
        deliver = 0
        while True:
            ptrace.cont(self.tid, deliver)
            stop = ptrace.wait(self.tid)
            if stop is None or stop.exited:
                raise RebuildError(f"puppet {self.tid} died instead of being stopped")
            if stop.group_stop:
                break
            if not stop.event and stop.signal == self.stop_signal:
                ptrace.set_sigmask(self.tid, _ALL_SIGNALS & ~stops)
                return False
            deliver = number if not stop.event and stop.signal == signal.SIGSTOP else 0
        ptrace.set_sigmask(self.tid, _ALL_SIGNALS & ~stops)
        for puppet in others:
            puppet._join_stop()
        return True

    def _join_stop(self) -> None:
        """Take part in the stop of the process, as one of its threads."""
        while True:
            ptrace.cont(self.tid)
            stop = ptrace.wait(self.tid)
            if stop is None or stop.exited:
                raise RebuildError(f"puppet {self.tid} died instead of being stopped")
            if stop.group_stop:
                return

    def leave_scratch(self, syscall_instruction: int) -> None:
        """Unmap the scratch area from under the puppet; no call can be run in its process after this.

        The munmap is issued from the program's own code, and stopped at its end by PTRACE_SYSCALL: a
        trap instruction or a single step would reset the program's action for SIGTRAP.

        Args:
            syscall_instruction: address of a ``syscall`` instruction in a mapping that stays.
        """
        regs = arch.Registers(ptrace.get_regs(self.tid)).replace(
            rip=syscall_instruction,
            rax=arch.NR.munmap,
            rdi=self.stage.scratch,
            rsi=SCRATCH_BYTES,
            orig_rax=-1,
        )
        ptrace.set_regs(self.tid, regs.pack())
        for _ in ("entry", "exit"):
            ptrace.cont_to_syscall(self.tid)
            stop = ptrace.wait(self.tid)
            while stop is not None and stop.event:
                ptrace.cont_to_syscall(self.tid)
                stop = ptrace.wait(self.tid)
            if stop is None or stop.exited or stop.signal != signal.SIGTRAP:
                raise RebuildError(f"puppet {self.tid} did not come back from unmapping its scratch area")
        result = arch.Registers(ptrace.get_regs(self.tid)).syscall_result
        if result:
            raise RebuildError(f"puppet {self.tid}: unmapping the scratch area: {os.strerror(-result)}")
        ptrace.interrupt(self.tid)
        ptrace.cont(self.tid)
        self._await_event_stop()

    def put_on(self, registers: bytes, xstate: bytes, sigmask: int) -> None:
        """Set what the task will have when it is set free; no call can be run in it after this."""
        ptrace.set_xstate(self.tid, xstate)
        ptrace.set_regs(self.tid, registers)
        ptrace.set_sigmask(self.tid, sigmask)

    # -- the end --------------------------------------------------------------------

    def wait_exit(self) -> int:
        """Wait until the puppet, told to exit, is gone for its tracer; returns its wait status."""
        while True:
            stop = ptrace.wait(self.tid)
            if stop is None or stop.exited:
                self._struck_out()
                return stop.status if stop else 0
            ptrace.cont(self.tid, 0 if stop.event else stop.signal)

    def run_to_exit(self, number: int, *args: Argument) -> int:
        """Run a system call that the puppet does not survive (exit_group); returns its wait status."""
        call = Call(number, args)
        layout = lay_out([call], self._table)
        _write_all(self.memory, layout.image, self._table)
        regs = arch.Registers(ptrace.get_regs(self.tid)).replace(
            rip=self._stub, rbx=self._table, r12=1, r13=self.stop_signal, orig_rax=-1
        )
        ptrace.set_regs(self.tid, regs.pack())
        ptrace.cont(self.tid)
        return self.wait_exit()

    def die_of(self, number: int) -> int:
        """Let the puppet be killed by signal `number` (default action, no core); returns its wait status."""
        ptrace.set_sigmask(self.tid, _ALL_SIGNALS & ~(1 << (number - 1)))
        os.kill(self.pid, number)
        with suppress(ProcessLookupError):  # SIGKILL takes it out of its stop
            ptrace.cont(self.tid)
        return self.wait_exit()

    def kill_and_reap(self) -> None:
        """End the puppet and collect it, as far as it is our child; idempotent."""
        if not self.is_held:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while not self._has_ended():
                time.sleep(_END_PAUSE_S)
        self._struck_out()

    def _has_ended(self) -> bool:
        """Take the next report of the killed task, and of the other tasks of its process."""
        stop = ptrace.wait(self.tid, nohang=True)
        if stop is not None:
            return stop.exited
        # Ends wait for each other: a process's for those of its threads, and the last thread of a pid
        # namespace's first process for the release of every pid in it, its sisters' too.
        with suppress(OSError):  # it is gone; or no descriptor is left to look: an end needs none, as a rule
            for tid in map(int, os.listdir(f"/proc/{self.pid}/task")):
                if tid != self.tid:
                    with suppress(ChildProcessError):
                        ptrace.wait(tid, nohang=True)
        return False

    def reap_children(self, exit_signal: int = signal.SIGCHLD) -> None:
        """Collect the puppet's dead children inside it, and forget that they died.

        Only while the tree grows or is given up: no process of the tree is dead yet, so whoever is
        was a helper, or is not wanted any more.

        Args:
            exit_signal: what they sent, besides SIGCHLD.
        """
        with suppress(ChildProcessError):
            while self.syscall(arch.NR.wait4, -1, 0, ptrace.WALL | os.WNOHANG, 0) > 0:
                pass
        self.forget_child_signals(exit_signal)

    def forget_child_signals(self, exit_signal: int = signal.SIGCHLD) -> None:
        """Take SIGCHLD out of the puppet's queue, where the end of a child during the rebuild put it."""
        numbers = {int(signal.SIGCHLD), exit_signal} - {0}
        child_set = sum(1 << (number - 1) for number in numbers).to_bytes(8, "little")
        with suppress(BlockingIOError):
            while True:
                self.syscall(arch.NR.rt_sigtimedwait, child_set, 0, bytes(16), 8)

    def disown(self) -> None:
        """From now on the puppet outlives us (no EXITKILL); the last step before `set_free`."""
        ptrace.set_options(self.tid, 0)

    def set_free(self) -> None:
        """Detach: the puppet is a process like any other now, and runs."""
        self.all_free([self])

    @property
    def is_held(self) -> bool:
        """Whether it was neither set free nor ended by us."""
        return self.stage.alive.get(self.tid) is self

    def _struck_out(self) -> None:
        self._forget_memory()
        if self.stage.alive.pop(self.tid, None) is not None:
            LEDGER.give_back("puppet", self.tid)

    @staticmethod
    def all_free(puppets: Iterable[Puppet]) -> float:
        """Detach them all, one right after the other: who runs already may take the processor from us.

        It may also end some of the others (kill(2), and exit_group(2) or execve(2) of a thread), as it may at any time:
        these are passed over, and nobody waits for us to hear of their end.

        Returns:
            When the last one was let go, on the clock of time.monotonic.

        Raises:
            OSError: ESRCH: the first one is gone; nobody runs.
        """
        freed: list[Puppet] = []
        ended: list[Puppet] = []
        last_s = time.monotonic()
        try:
            for puppet in puppets:
                last_s = time.monotonic()
                try:
                    ptrace.detach(puppet.tid)
                except ProcessLookupError:
                    if not freed:
                        raise
                    ended.append(puppet)
                else:
                    freed.append(puppet)
            deadline = time.monotonic() + _PASSED_OVER_S
            for puppet in ended:
                puppet._take_end(deadline)
        finally:
            for puppet in [*freed, *ended]:
                puppet._struck_out()
        return last_s

    def _take_end(self, deadline: float) -> None:
        """Of who ends as a tracee nobody else hears before us. A child of ours is left to who waits for it."""
        with suppress(ChildProcessError, ProcessLookupError):
            if self.tid == self.pid and procfs.stat(self.pid).ppid == os.getpid():
                return
            while not ptrace.take_end(self.tid) and time.monotonic() < deadline:
                time.sleep(_END_PAUSE_S)


def seen_pids(tid: int) -> tuple[int, ...]:
    """The pids of task `tid`, outermost first, from the pipeline's pid namespace inwards (NSpid)."""
    with open(f"/proc/{tid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"NSpid:"):
                return tuple(map(int, line.split()[1:]))
    raise RebuildError(f"puppet {tid} has no NSpid: is /proc that of another pid namespace?")


def _data_bytes(call: Call) -> int:
    """A bound of the bytes behind the table that `call` needs."""

    def size(arg: Argument) -> int:
        if isinstance(arg, int):
            return 0
        if isinstance(arg, bytes):
            return len(arg) + 16
        if isinstance(arg, Out):
            return arg.size_bytes + 16
        return 16 + sum(8 + (len(p) if isinstance(p, bytes) else size(p)) for p in arg.parts)

    found = 0
    for arg in call.args:
        if not isinstance(arg, int):  # most are
            found += size(arg)
    return found


def _write_all(fd: int, content: bytes, address: int) -> None:
    if os.pwrite(fd, content, address) != len(content):
        raise OSError(errno.EFAULT, f"short write of {len(content)} bytes at {address:#x}")


def spawn_launcher(
    scratch: RemoteAddress, channel_fd: int, reserved: Sequence[AbstractSet[int]] = ()
) -> Puppet:
    """Spawn the first puppet: a child of ours, in our namespaces, with our credentials.

    Args:
        scratch: an address where `SCRATCH_BYTES` are free in every layout of the tree.
        channel_fd: see `Stage`.
        reserved: see `Stage`.

    Ownership: the caller ends it with `kill_and_reap` and then closes ``stage.channel``.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stage = Stage(scratch, ours, channel_fd, reserved)
    missed: list[Puppet] = []
    try:
        with theirs:
            while True:
                puppet = _spawn(stage, theirs.fileno())
                if not reserved or puppet.pid not in reserved[0]:
                    return puppet
                missed.append(puppet)
    except BaseException:
        ours.close()
        raise
    finally:
        for puppet in missed:
            puppet.kill_and_reap()


def _spawn(stage: Stage, channel: int) -> Puppet:
    program = os.memfd_create("puppet", os.MFD_CLOEXEC)
    try:
        os.write(program, arch.puppet_program(stage.channel_fd))
        os.fchmod(program, 0o555)
        # a program that is open for writing cannot be executed
        reader = os.open(f"/proc/self/fd/{program}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(program)
    try:
        pid = HostPid(
            os.posix_spawn(
                f"/proc/self/fd/{reader}",
                ["puppet"],
                {},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, channel, stage.channel_fd),
                    (os.POSIX_SPAWN_DUP2, reader, stage.channel_fd + 1),
                ],
                setsigmask=signal.valid_signals(),
                setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
            )
        )
    finally:
        os.close(reader)
    puppet = Puppet(stage, pid, pid)
    try:
        ptrace.seize(pid, _OPTIONS | OPTION.EXITKILL)
        ptrace.interrupt(pid)
        puppet._await_event_stop()
        ptrace.set_sigmask(pid, _ALL_SIGNALS & ~(1 << (puppet.stop_signal - 1)))
        puppet._set_up_scratch()
        # whatever descriptors it inherited from us are none of its business
        puppet.syscall(arch.NR.close_range, 0, stage.channel_fd - 1, 0)
        puppet.syscall(arch.NR.close_range, stage.channel_fd + 2, 0xFFFF_FFFF, 0)
    except BaseException:
        puppet.kill_and_reap()
        raise
    return puppet
