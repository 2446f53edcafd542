"""Giving a puppet its namespaces and its memory: what `Growth` calls for `Become` and `Inherit`.

Become: ids that only exist further out, namespaces, then a fresh address space. The
program is executed *inside* the final user namespace, because the kernel ties an
address space to the user namespace it was made in. execve drops the capabilities of
whoever is not root there, and a map may have no root, so they are carried over as
ambient ones and laid off again.

Inherit: namespaces, then only what differs from the parent's mappings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd, RemoteFd
from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace, Id, MappedFile, PathRef, Process
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources import other_names
from pipeline.resources.cgroups.making import CgroupMaking
from pipeline.resources.memory import rebuild
from pipeline.resources.memory.rebuild import Source
from pipeline.resources.namespaces.ipc import Segment
from pipeline.resources.namespaces.keepers import Keepers
from pipeline.resources.pty_session import ControllingTerminals
from pipeline.resources.tasks import credentials, inherited, loginuid
from pipeline.resources.tasks.keyrings import SessionKeyrings
from pipeline.stages import memory_layout
from pipeline.stages.contents import Contents
from pipeline.stages.files_here import Written
from pipeline.stages.growth import Grown
from pipeline.userns.destination import Destination

_AMBIENT_RAISE = 2
_AMBIENT_CLEAR_ALL = 4
_LAST_CAPABILITY = 40


def execute_anew(puppet: Puppet) -> None:
    """Execute the puppet program where the puppet is now, without losing a capability."""
    permitted = _permitted(puppet.pid)
    raised = [bit for bit in range(_LAST_CAPABILITY + 1) if permitted >> bit & 1]
    calls = [credentials.capset(permitted, permitted, permitted)]
    calls += [Call(NR.prctl, (PRCTL.CAP_AMBIENT, _AMBIENT_RAISE, bit, 0, 0), name="raise") for bit in raised]
    puppet.run_checked(calls)
    puppet.exec_puppet()
    puppet.run_checked(
        [
            Call(
                NR.prctl, (PRCTL.CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0), name="clear ambient capabilities"
            ),
            credentials.capset(permitted, permitted, 0),
            Call(NR.prctl, (PRCTL.SET_DUMPABLE, 1, 0, 0, 0), name="PR_SET_DUMPABLE"),
            *inherited.taken_back(),
        ]
    )


def _permitted(pid: int) -> int:
    with open(f"/proc/{pid}/status", "rb") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith(b"CapPrm:"))


class MappedFiles:
    """The files that mappings and exe links need, opened once and checked to be the same as at the source."""

    def __init__(
        self,
        image: Image,
        contents: Contents,
        open_path: Callable[[PathRef, int], LocalFd],
        policy: RestorePolicy,
        written: Written,
    ) -> None:
        self._policy = policy
        self._written = written
        self._image = image
        self._contents = contents
        self._open_path = open_path
        self._fds: dict[tuple[int, bool], LocalFd] = {}

    def fd(self, index: int, writable: bool) -> LocalFd:
        """A descriptor of file `index`; owned here.

        Raises:
            RebuildError: it is not there, or is another one.
        """
        key = (index, writable)
        if key not in self._fds:
            fd = self._open(self._image.mapped_files[index], writable)
            LEDGER.take("mapped file", fd)
            self._fds[key] = fd
        return self._fds[key]

    def _open(self, file: MappedFile, writable: bool) -> LocalFd:
        flags = os.O_RDWR if writable else os.O_RDONLY
        if file.content is not None:
            source = self._contents.fd(file.content)
            return LocalFd(os.open(f"/proc/self/fd/{source}", flags | os.O_CLOEXEC))
        name = os.fsdecode(file.path.path)
        try:
            if file.last_name:
                fd = other_names.open_as(file.last_name, self._open_path, file.path, flags)
            else:
                fd = self._open_path(file.path, flags)
        except OSError as error:
            raise RebuildError(
                f"mapped file {name}: {error.strerror}; bring it to this host first"
            ) from error
        try:
            reason = self._written.refusal(file, self._policy.files, fd)
            if reason:
                raise RebuildError(f"mapped file {name} is not the same here: {reason}")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def close(self) -> None:
        """Close all; idempotent."""
        while self._fds:
            _, fd = self._fds.popitem()
            os.close(fd)
            LEDGER.give_back("mapped file", fd)


class Embodiment:
    """Namespaces and memory for puppets; see `pipeline.stages.growth.Body`.

    Args:
        image: the records.
        files: for mappings of files.
        contents: for mappings of shared memory.
        keepers: of the namespaces.
        ids: what ids are called in each user namespace.
        terminals: what session leaders take when they found their session.
        cgroups: of the tree.
    """

    def __init__(
        self,
        image: Image,
        files: MappedFiles,
        contents: Contents,
        keepers: Keepers,
        ids: Destination,
        terminals: ControllingTerminals,
        cgroups: CgroupMaking,
    ) -> None:
        self._image = image
        self._files = files
        self._contents = contents
        self._keepers = keepers
        self._ids = ids
        self._cgroups = cgroups
        self._logins_lost: set[Id | None] = set()
        self._keyrings = SessionKeyrings(ids.forest.number_in)
        #: what is not as it was, and stops nothing
        self.notes: list[str] = self._keyrings.notes
        self.session_founded = terminals.session_founded
        self.join_owner = keepers.join_owner
        self.pid_namespace_begins = keepers.mount_late
        self.begin_time = keepers.begin_time
        self.choose_empty_pids = keepers.choose_empty_pids

    def become(self, process: Process, grown: Grown) -> None:
        """`Become` of the plan."""
        puppet = grown.puppet
        space = self._space(process)
        self._move_in(process, grown)
        execute_anew(puppet)
        wanted = rebuild.sources(space.vmas)
        with self._sent(puppet, wanted, space.exe) as (fds, exe):
            memory_layout.empty(puppet, space)
            memory_layout.set_bounds(puppet, space, exe)
            puppet.run_checked(rebuild.create(space, fds, self._segments(process)))

    def inherit(self, process: Process, grown: Grown) -> None:
        """`Inherit` of the plan."""
        puppet = grown.puppet
        space = self._space(process)
        parent = self._space(self._image.processes[process.parent])
        self._move_in(process, grown)
        with self._sent(puppet, rebuild.missing(parent, space), None) as (fds, no_exe):
            puppet.run_checked(rebuild.inherit(parent, space, fds, self._segments(process)))
            memory_layout.set_bounds(puppet, space, no_exe)

    def update(self, image: Image, files: MappedFiles, ids: Destination) -> None:
        """The tree is as a later image of it says by now."""
        self._image, self._files, self._ids = image, files, ids

    def change(self, process: Process, grown: Grown, before: AddressSpace) -> None:
        """Turn the memory that a process has, that of an earlier image, into what it has by now."""
        space = self._space(process)
        with self._sent(grown.puppet, rebuild.missing(before, space), None) as (fds, no_exe):
            grown.puppet.run_checked(rebuild.inherit(before, space, fds, self._segments(process)))
            memory_layout.set_bounds(grown.puppet, space, no_exe)

    def share(self, process: Process, grown: Grown) -> None:
        """`Share` of the plan: its memory is there."""
        self._move_in(process, grown)

    def _move_in(self, process: Process, grown: Grown) -> None:
        puppet = grown.puppet
        self._cgroups.place(process, puppet.pid)
        self._log_in(process, puppet)
        wanted = process.threads[0].credentials
        credentials.before_join(puppet, wanted, grown.members.user, self._ids.uid, self._ids.gid)
        self._keepers.join(puppet, grown.members, process.namespaces)
        self._keyrings.give(process, puppet)
        puppet.syscall(NR.prctl, PRCTL.SET_DUMPABLE, 1, 0, 0, 0)
        # the namespace for its children is a step of its own, if it is not the one it is in
        here = process.namespaces
        begun = grown.members.time_for_children == here.time_for_children
        grown.members = here if begun else replace(here, time_for_children=here.time)

    def _log_in(self, process: Process, puppet: Puppet) -> None:
        wanted = process.loginuid
        number = self._ids.forest.number_in(wanted, 0, "uid") if wanted is not None else None
        lost = (
            "it has no place here" if wanted is not None and number is None else loginuid.keep(puppet, number)
        )
        if lost and wanted not in self._logins_lost:
            self._logins_lost.add(wanted)
            whose = self._ids.describe(wanted, "uid") if wanted is not None else "nobody"
            self.notes.append(f"pid {process.pids[0]}: its login ({whose}) becomes the restorer's: {lost}")

    def _segments(self, process: Process) -> Mapping[int, Segment]:
        state = self._keepers.ipc_state(process.namespaces.ipc)
        return {segment.space: segment for segment in state.segments}

    def _space(self, process: Process) -> AddressSpace:
        if process.space is None:
            raise RebuildError(f"pid {process.pids[0]} has no memory in the image")
        return self._image.spaces[process.space]

    @contextmanager
    def _sent(
        self, puppet: Puppet, wanted: Sequence[Source], exe: int | None
    ) -> Iterator[tuple[dict[Source, RemoteFd], int]]:
        """Descriptors of the sources and of the executable in the puppet, closed at the end."""
        local = [self._local(source) for source in wanted]
        if exe is not None:
            local.append(self._files.fd(exe, writable=False))
        numbers = puppet.send_fds(local)
        fds = {source: RemoteFd(number) for source, number in zip(wanted, numbers, strict=False)}
        yield fds, numbers[-1] if exe is not None else -1
        puppet.run_checked([Call(NR.close, (number,)) for number in numbers])

    def _local(self, source: Source) -> LocalFd:
        if source.kind == "file":
            writable = self._image.mapped_files[source.number].writable and not source.read_only
            return self._files.fd(source.number, writable)
        fd = self._contents.fd(source.number)
        return self._contents.read_only(source.number) if source.read_only else fd
