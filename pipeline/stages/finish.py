"""The last steps of a rebuild: from puppets with memory to processes that are ready to run.

The order, each step for all processes before the next begins:

1. threads, since nothing is forked any more;
2. descriptors: made, joined, handed over;
3. working directory, root, umask;
4. what had to wait for the pages and the births: advice, locks, guards, seals of memory;
5. zombies end, and who is to be stopped by job control is stopped;
6. task state that needs capabilities or numbers: limits, signal actions, timers, ids, filters;
7. the scratch area goes, registers and masks are put on.

Nothing has run yet. `thaw` then lets everything go: first no puppet dies with us any
more, then each is detached.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

from msgspec.structs import replace

from pipeline.errors import ImageError, RebuildError
from pipeline.ids import LocalFd
from pipeline.image import numbers
from pipeline.image.codec import Image
from pipeline.image.schema import FileOwner, PathRef, Place, Process
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, PRCTL
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.memory import aio, rebuild
from pipeline.resources.tasks import directories, job_control, leaders, signals
from pipeline.stages.growth import Grown, Growth

_THREAD = CLONE.VM | CLONE.FS | CLONE.FILES | CLONE.SIGHAND | CLONE.THREAD | CLONE.SYSVSEM
_SYSCALL = b"\x0f\x05"


def living(image: Image, growth: Growth) -> list[tuple[Process, Grown]]:
    """Every process that is not a zombie, parents first."""
    return [
        (process, growth.grown[process.pids[0]])
        for process in image.processes.values()
        if process.state != "zombie"
    ]


def make_threads(image: Image, growth: Growth, *, early: bool = False) -> None:
    """Clone the threads of every process that are not there yet; `Grown.threads` are as in the image then.

    `early`: the image is a draft. Threads that have directories of their own come later: they may not have them then.
    """
    for process, grown in living(image, growth):
        grown.threads[:1] = [grown.puppet]
        wanted = [one for one in process.threads[1:] if one.place is None or not early]
        for at, thread in enumerate(wanted):
            if at < len(grown.thread_pids) and grown.thread_pids[at] == thread.pids:
                continue
            flags = _THREAD if thread.place is None else _THREAD & ~CLONE.FS
            puppet = growth.clone_task(grown, process.namespaces.pid, thread.pids, flags)
            grown.threads.insert(1 + at, puppet)
            grown.thread_pids.insert(at, thread.pids)


def end_threads(image: Image, growth: Growth, ended: Collection[int]) -> None:
    """End the threads, made from a draft, that are not in the image; those that stay are in its order then.

    Args:
        ended: level-0 pids of processes of the draft that do not stay, whoever has them in the image.
    """
    for pid, grown in growth.grown.items():
        made = dict(zip(map(tuple, grown.thread_pids), grown.threads[1:], strict=True))
        process = image.processes.get(pid) if pid not in ended else None
        del grown.threads[1:], grown.thread_pids[:]
        for thread in process.threads[1:] if process is not None and process.state != "zombie" else ():
            puppet = made.pop(tuple(thread.pids), None) if thread.place is None else None
            if puppet is not None:
                grown.threads.append(puppet)
                grown.thread_pids.append(thread.pids)
        for puppet in made.values():
            puppet.run_to_exit(NR.exit, 0)


def complete_memory(image: Image, growth: Growth) -> None:
    """Rings of asynchronous I/O; advice, guards, names, locks and seals of every mapping."""
    for process, grown in living(image, growth):
        if process.space is not None and not process.together.vm:
            aio.rebuild(image.spaces[process.space], grown.puppet)
            grown.puppet.run_checked(rebuild.complete(image.spaces[process.space]))


class OpenDirectory(Protocol):
    """A descriptor of a directory, of one that was removed where its owner is given; the caller owns it."""

    def __call__(self, path: PathRef, was_removed: FileOwner | None) -> LocalFd:
        """OSError, RebuildError: it is not there, or cannot be made."""


def set_directories(image: Image, growth: Growth, open_directory: OpenDirectory) -> Iterator[None]:
    """Root, working directory and umask of every process, and of threads that have their own. Yields between them."""
    for process, grown in living(image, growth):
        if not process.together.fs and process.root is not None and process.cwd is not None:
            place = Place(**{name: getattr(process, name) for name in Place.__struct_fields__})
            _put(grown.puppet, open_directory, place, process)
        for thread, puppet in zip(process.threads, grown.threads, strict=True):
            if thread.place is not None:
                _put(puppet, open_directory, thread.place, process)
        yield


def _put(puppet: Puppet, open_directory: OpenDirectory, place: Place, process: Process) -> None:
    with ExitStack() as stack:
        if place.root_of_ended or place.cwd_of_ended:
            puppet = stack.enter_context(_ending(puppet))
        if place.root.path != b"/":
            chroot = Call(NR.chroot, (b".\0",), name="chroot")
            root = partial(open_directory, was_removed=None)
            _enter(puppet, root, place.root, place.root_of_ended, process, "root directory", chroot)
        umask = Call(NR.umask, (place.umask,))
        cwd = partial(open_directory, was_removed=place.cwd_removed)
        _enter(puppet, cwd, place.cwd, place.cwd_of_ended, process, "working directory", umask)


@contextmanager
def _ending(puppet: Puppet) -> Iterator[Puppet]:
    """A helper that changes the directories of `puppet`, too, and has ended behind the block."""
    helper = puppet.clone(CLONE.FS)
    try:
        yield helper
    finally:
        helper.kill_and_reap()
        puppet.reap_children()


def _enter(
    puppet: Puppet,
    opened: Callable[[PathRef], LocalFd],
    path: PathRef,
    of_ended: bool,
    process: Process,
    what: str,
    then: Call,
) -> None:
    """Change the directory; to one of its own in /proc where it is of a process that has ended."""
    below = []
    place = path
    if of_ended:
        mounted, name = _of_process(path, process, what)
        place = replace(path, path=mounted)
        below = [Call(NR.chdir, (b"self/" + name + b"\0",), name=f"chdir to its {what}")]
    try:
        directory = opened(place)
    except OSError as error:
        raise RebuildError(
            f"pid {process.pids[0]}: its {what} {os.fsdecode(path.path)}: {error.strerror}"
        ) from error
    try:
        (number,) = puppet.send_fds([directory])
    finally:
        os.close(directory)
    fchdir = Call(NR.fchdir, (number,), name=f"fchdir to its {what}")
    puppet.run_checked([fchdir, *below, then, Call(NR.close, (number,))])


def _of_process(path: PathRef, process: Process, what: str) -> tuple[bytes, bytes]:
    found = directories.of_process(path.path)
    if found is None:
        raise ImageError(f"pid {process.pids[0]}: its {what} {os.fsdecode(path.path)} is not of a process")
    return found


def end_zombies(image: Image, growth: Growth, give_ids: Callable[[Process, Grown], None]) -> list[str]:
    """Let the zombies die as they did, unseen: their parents' SIGCHLD was before the dump.

    Args:
        give_ids: gives one the ids it died with.

    Returns:
        In words, which of them did not die in quite the same way.
    """
    notes = []
    for process in image.processes.values():
        if process.state != "zombie":
            continue
        grown = growth.grown[process.pids[0]]
        puppet = grown.puppet
        give_ids(process, grown)
        puppet.syscall(NR.prctl, PRCTL.SET_NAME, process.comm + b"\0")
        status = process.exit_status
        if os.WIFSIGNALED(status):
            here = _die_of(puppet, os.WTERMSIG(status))
        else:
            here = puppet.run_to_exit(NR.exit_group, os.WEXITSTATUS(status))
        if here != status:
            why = ": it has left a core dump, which is not left again" if os.WCOREDUMP(status) else ""
            notes.append(
                f"pid {process.pids[0]}: has ended with wait status {status:#x}, and has {here:#x} now{why}"
            )
        parent = growth.grown.get(process.parent)
        if parent is not None:
            parent.puppet.forget_child_signals()
    return notes


def stop_stopped(image: Image, growth: Growth) -> None:
    """Stop the processes that are to stand still, before their parents get the signals that they have queued."""
    for process, grown in living(image, growth):
        above = growth.grown.get(process.parent)
        parent = (image.processes[process.parent], above.puppet) if above is not None else None
        job_control.stop(process, grown.threads, parent)


def _die_of(puppet: Puppet, number: int) -> int:
    no_core = bytes(16)
    rlimit_core = 4
    puppet.syscall(NR.prlimit64, 0, rlimit_core, no_core, 0)
    default = bytes(32)
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        puppet.syscall(NR.rt_sigaction, number, default, 0, 8)
    return puppet.die_of(number)


def put_on(image: Image, growth: Growth, registers: Callable[[Process, int], bytes]) -> None:
    """Take the scratch area away and give every task its registers, extended state and mask."""
    for _, grown in living(image, growth):
        own = grown.puppet.stage.channel_fd
        grown.puppet.syscall(NR.close_range, own, own + numbers.PUPPET_FDS - 1, 0)
    for process, grown in living(image, growth):
        way_out = _syscall_instruction(image, process, grown.puppet)
        if not process.together.vm:
            grown.puppet.leave_scratch(way_out)
        for index, (thread, puppet) in enumerate(zip(process.threads, grown.threads, strict=True)):
            last = registers(process, index)
            if thread.ended is not None:
                last = leaders.last_registers(thread, way_out)
            puppet.put_on(last, thread.xstate, thread.sigmask)


def _syscall_instruction(image: Image, process: Process, puppet: Puppet) -> int:
    space = image.spaces[process.space] if process.space is not None else None
    code = [
        vma for vma in (space.vmas if space is not None else ()) if vma.prot & 4 and vma.kind != "vsyscall"
    ]
    for vma in sorted(code, key=lambda vma: vma.kind != "vdso"):
        at = os.pread(puppet.memory, vma.end - vma.start, vma.start).find(_SYSCALL)
        if at >= 0:
            return vma.start + at
    raise RebuildError(f"pid {process.pids[0]} has no system call instruction in any executable mapping")


def thaw(image: Image, growth: Growth) -> float:
    """Let the tree run. After the first line nothing of it dies with us; there is no way back.

    Returns:
        When all of it did, on the clock of time.monotonic.
    """
    tasks: Sequence[tuple[Process, Grown]] = living(image, growth)
    for _, grown in tasks:
        for puppet in grown.threads:
            puppet.disown()
    for process, grown in tasks:
        if signals.stops_when_free(process):
            os.kill(grown.puppet.pid, signal.SIGSTOP)
    # first threads come last: mostly they have the most to do, and who runs may keep a processor for a while
    others = [puppet for _, grown in tasks for puppet in grown.threads[1:]]
    return Puppet.all_free([*others, *(puppet for _, grown in tasks for puppet in grown.threads[:1])])
