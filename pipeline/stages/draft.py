"""When a tree that was built from one look at it can become that of a later look. Pure; asked by both sides.

While a tree is sent that runs, the destination builds from a *draft*: namespaces, processes, mappings, memory. When the
tree stands still, it is looked at once more, and what was built is changed to that: mappings and pages that differ.
Everything else that had a part in the building has to be the same; what a process gets only at the end (threads,
descriptors, timers, registers...) may be anything.

If it is not the same, the tree is built anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec
from msgspec.structs import replace

from pipeline.image.codec import Image
from pipeline.image.schema import Credentials, Namespace, Process, SharedMemory
from pipeline.resources import external_state, pty_state
from pipeline.resources.memory.rebuild import find_hole, leaves_free
from pipeline.stages.memory_layout import HOLE_BYTES

#: descriptors that a tree may have more of in the end than in its draft
SPARE_DESCRIPTORS = 256


def differences(draft: Image, now: Image) -> Iterator[str]:
    """Why what was built from `draft` cannot become `now`, in words; nothing if it can."""
    if _host(draft) != _host(now):
        yield "it is on another host, or no job any more"
    yield from _other("user namespace", draft.user_namespaces, now.user_namespaces)
    names = {index: f"{one.kind} namespace" for index, one in {**draft.namespaces, **now.namespaces}.items()}
    for index, name in names.items():
        if _lasting(draft.namespaces.get(index)) != _lasting(now.namespaces.get(index)):
            yield f"{name} {index} is not what it was"
    yield from _other("cgroup", draft.cgroups, now.cgroups)
    yield from _other("file that goes along", draft.taken_files, now.taken_files)
    if list(draft.processes) != list(now.processes):
        yield "processes came or went"
        return
    for pid, process in now.processes.items():
        if _birth(draft.processes[pid]) != _birth(process):
            yield f"pid {pid} is in other namespaces, sessions or groups, or has other ids"
        if process.space is not None and draft.spaces[process.space].exe != now.spaces[process.space].exe:
            yield f"pid {pid} has executed another program"
    for space, shared in now.shared_memory.items():
        if space in draft.shared_memory and _identity(draft.shared_memory[space]) != _identity(shared):
            yield f"shared memory {space} has other seals"
    if _prepared_files(draft) != _prepared_files(now):
        yield "its terminals or ends outside are others"
    if highest_descriptor(now) > highest_descriptor(draft) + SPARE_DESCRIPTORS:
        yield "it has many more descriptors"
    hole = find_hole([space.vmas for space in draft.spaces.values()], HOLE_BYTES)
    if not all(leaves_free(hole, HOLE_BYTES, space.vmas) for space in now.spaces.values()):
        yield "it has mapped memory where it is worked on"


def highest_descriptor(image: Image) -> int:
    """The highest number, and the most descriptors, of any process."""
    tables = [process.fds for process in image.processes.values()]
    highest = max((entry.fd for table in tables for entry in table), default=0)
    return max(highest, max(map(len, tables), default=0), len(image.mapped_files))


def _host(image: Image) -> tuple[object, ...]:
    head = image.head
    return head.root, head.machine, head.xfeatures, head.xstate_size_bytes, head.vdso, head.job


def _other(name: str, draft: Mapping[int, object], now: Mapping[int, object]) -> Iterator[str]:
    for index in sorted(draft.keys() | now.keys()):
        if draft.get(index) != now.get(index):
            yield f"{name} {index} is not what it was"


def _lasting(namespace: Namespace | None) -> Namespace | None:
    """A namespace without what goes on by itself: clocks."""
    return replace(namespace, state={}) if namespace is not None and namespace.kind == "time" else namespace


def _birth(process: Process) -> tuple[Process, Credentials | None]:
    """What a process has from the beginning."""
    first = process.threads[0].credentials if process.threads else None
    return (
        replace(
            process,
            state="zombie" if process.state == "zombie" else "running",
            exit_status=0,
            stop_signal=0,
            notice="",
            fds=[],
            cwd=None,
            cwd_removed=None,
            root=None,
            umask=0,
            actions=[],
            pending=[],
            limits=[],
            itimers=[],
            timers=[],
            undo=[],
            oom_score_adj=0,
            autogroup_nice=0,
            child_subreaper=False,
            threads=[],
            comm=b"",
        ),
        first,
    )


def _identity(shared: SharedMemory) -> SharedMemory:
    return replace(shared, size_bytes=0)


def _prepared_files(image: Image) -> dict[int, object]:
    """Open files that are made before the processes."""
    found: dict[int, object] = {}
    for index, file in image.files.items():
        if file.kind == external_state.KIND_NAME:
            found[index] = (file.flags, file.state)
        elif file.kind == pty_state.KIND_NAME:
            state = msgspec.convert(file.state, pty_state.PtyState)
            if state.terminal is not None and state.terminal.session:
                found[index] = (state.number, state.ptmx, state.terminal.session)
    return found
