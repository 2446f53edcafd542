"""The rebuild stage: what there is of a tree until it stands ready, all of it stopped, and each step to it.

In which order the steps come, and the pages with them, is said in `pipeline.stages.building`. What is taken is taken
in one place, `Rebuilding`, and given back in reverse order however it ends. Until `thaw`, ending means that nothing
is left; after it, that nothing of the tree is ours any more.
"""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import signal
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import msgspec
from msgspec.structs import replace

from pipeline.errors import ImageError, PipelineError, RebuildError, Refused, exhausted
from pipeline.ids import HostPid, LocalFd
from pipeline.image import delta, numbers
from pipeline.image.codec import Image
from pipeline.image.plan import fill_order, plan
from pipeline.image.schema import PathRef, Process, TakenFile
from pipeline.image.steps import Fill
from pipeline.kernel import descriptor_table, procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.ledger import LEDGER
from pipeline.policy import RestorePolicy
from pipeline.remote.births import Announcer, Here, Inside
from pipeline.remote.init import Init
from pipeline.remote.puppet import Puppet, spawn_launcher
from pipeline.resources.cgroups.making import CgroupMaking
from pipeline.resources.given_ends import GivenEnds
from pipeline.resources.memory import huge_pages
from pipeline.resources.memory.fresh import Fresh, fresh
from pipeline.resources.memory.rebuild import find_hole
from pipeline.resources.memory.watch import ENTRY, watch
from pipeline.resources.namespaces import network_here
from pipeline.resources.namespaces.clocks_here import ClocksHere
from pipeline.resources.namespaces.keepers import Keepers
from pipeline.resources.pty_session import ControllingTerminals
from pipeline.resources.taken import Making
from pipeline.resources.tasks import credentials, inherited, semaphore_undo, timers
from pipeline.resources.tasks.reinstate import check_here, reinstate
from pipeline.stages import draft, files_here, finish, memory_layout, same_machine
from pipeline.stages.body import Embodiment, MappedFiles
from pipeline.stages.contents import Contents
from pipeline.stages.descriptors import Descriptors
from pipeline.stages.files_here import Written
from pipeline.stages.growth import Grown, Growth
from pipeline.stages.late import Late
from pipeline.stages.pager import Watched
from pipeline.stages.places import MemoryPlace, Place
from pipeline.stages.roots import Roots
from pipeline.userns.destination import Destination, Unmapped
from pipeline.userns.externals import FLAGS, Externals, given_devices, given_namespaces, opened

P = ParamSpec("P")
T = TypeVar("T")


class Terms(msgspec.Struct, frozen=True):
    """How a tree is rebuilt.

    Args:
        new_pidns: make a pid namespace for the tree, with a first process that waits for it.
        placing, unmapped: see `Destination`.
        externals: namespaces that take the place of the external ones, instead of our own, and what devices hang on.
        policy: decisions about states that have more than one good answer.
        job_terminal: the path of the terminal of the shell whose job the tree becomes; None: of none.
        strict_ends: what is given for ends outside of the tree has to be in the image.
        live: the image is a draft: the tree goes on to change, and `Rebuilding.update` says what it has become.
        later: pages may be missing when the tree runs (post-copy): `Rebuilding.take_watched` is called before `thaw`.
    """

    new_pidns: bool = False
    placing: str = "same"
    unmapped: Unmapped = "refuse"
    externals: Externals = msgspec.field(default_factory=dict)
    policy: RestorePolicy = msgspec.field(default_factory=RestorePolicy)
    job_terminal: str | None = None
    strict_ends: bool = False
    live: bool = False
    later: bool = False


def _step(act: Callable[Concatenate[Rebuilding, P], T]) -> Callable[Concatenate[Rebuilding, P], T]:
    """A step of a rebuild: where the kernel refuses what nobody has foreseen, it is a RebuildError that says why."""

    @wraps(act)
    def acted(self: Rebuilding, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return act(self, *args, **kwargs)
        except (OSError, RebuildError) as error:
            if killed := self.killed():
                why = f"process {killed[0]} was killed while it was built"
            elif isinstance(error, RebuildError):
                raise
            else:
                why = "a step of the rebuild failed"
            raise RebuildError(f"{why}: {exhausted(error) or error}") from error

    return acted


class Rebuilding:
    """A tree that is being rebuilt; everything it holds is given back by `close`, once.

    All methods run in the tracer's thread.

    Args:
        image: complete and checked.
        terms: how it is rebuilt.
    """

    def __init__(self, image: Image, terms: Terms) -> None:
        self.policy = terms.policy
        self._image = image
        self._terms = terms
        self._externals = terms.externals
        self._init: Init | None = None
        self._stack = ExitStack()
        self._thawed = False
        #: since when the tree runs, on the clock of time.monotonic
        self.runs_since_s = math.inf
        self._watched: list[Watched] = []
        #: the steps that make threads and open files, and the open files when these begin
        self._equipping: Iterator[None] | None = None
        self._descriptors: Descriptors | None = None
        #: by space, until it has all of its pages
        self._fresh: dict[int, Fresh] = {}
        self._ids = Destination(image, terms.placing, terms.unmapped)
        self._planner = plan(
            list(image.processes.values()),
            list(image.spaces.values()),
            list(image.namespaces.values()),
            list(image.user_namespaces.values()),
        )
        if self._planner.blockers:
            raise ImageError("the tree cannot grow: " + "; ".join(map(str, self._planner.blockers)))
        self.contents = Contents()
        self._ends = GivenEnds(image, self.policy, terms.job_terminal, terms.strict_ends)
        #: files that came along and are not made yet, by mount namespace
        self._untaken: dict[int, list[TakenFile]] = defaultdict(list)
        self._roots = Roots(self._root_path)
        self._written = Written(live=terms.live)
        self._late = Late()
        #: our child that was let run and is to be collected
        self._collected: HostPid | None = None
        self._stack.callback(self._collect)
        self._stack.callback(self._late.close)
        self._stack.callback(self._close_watched)
        self._stack.callback(self._close_fresh)

    # -- the steps ---------------------------------------------------------------------

    @_step
    def prepare(self) -> None:
        """Launcher, namespaces, shared objects: all that stands before the first process."""
        descriptor_table.raise_limit()
        descriptor_table.make_room(len(self._image.files))
        image = self._image
        self._ids.refuse_unplaced()
        given = given_devices(self._externals)
        with self._outer_network() as network:
            lacking = list(
                network_here.check_here(
                    image.namespaces,
                    lambda one, kind: self._ids.forest.number_in(one, 0, kind),
                    self._ids.numbers_stay,
                    given,
                    network,
                )
            )
        lacking += self._ends.missing()
        if lacking:
            raise Refused(lacking)
        self._stack.callback(self._ends.close)
        self._ends.open()
        self._cgroups = self._make_cgroups()
        blockers = list(check_here(list(image.processes.values())))
        if blockers:
            raise Refused(blockers)
        if lacking := list(huge_pages.lacking(image)):
            raise Refused(lacking)
        hole = find_hole([space.vmas for space in image.spaces.values()], memory_layout.HOLE_BYTES)
        self._launcher = spawn_launcher(
            hole, self._channel_fd(), numbers.reserved_pids(image, self._terms.new_pidns)
        )
        self._stack.callback(self._end_launcher)
        same_machine.check(image.head, self._launcher)
        self._join_externals()
        living = [p.namespaces for p in image.processes.values() if p.state != "zombie"]
        external = next(n.index for n in image.namespaces.values() if n.kind == "time" and n.external)
        self._clocks = ClocksHere(image.head, self.policy.clocks, external, living)
        self._clocks.go_on(self._launcher)
        self._stack.callback(self._cgroups.close)
        self._cgroups.make()
        announcer: Announcer
        if self._terms.new_pidns:
            self._init = Init(self._launcher)
            self._stack.callback(self._end_init)
            announcer = Inside(self._init.puppet)
        else:
            announcer = Here()
        around = self._init.puppet if self._init is not None else None
        self._keepers = Keepers(
            self._launcher, self._ids.forest, self._stack, around, self._ids.number, given, self._cgroups
        )
        members = [process.namespaces for process in image.processes.values()]
        begun_later = {m.time_for_children for m in members if m.time_for_children != m.time}
        self._keepers.make(image.namespaces, begun_later)
        self._cgroups.open()
        self._stack.callback(self.contents.close)
        self.contents.make(image, self._launcher, self._ids.uid_here, self._ids.gid_here)
        files = MappedFiles(image, self.contents, self._open_path, self.policy, self._written)
        self._stack.callback(files.close)
        self._stack.callback(self._roots.close)
        self._terminals = ControllingTerminals(image.files.values(), self._open_path)
        self._stack.callback(self._terminals.close)
        self._body = body = Embodiment(
            image, files, self.contents, self._keepers, self._ids, self._terminals, self._cgroups
        )
        self._body.notes += [*self._clocks.notes, *inherited.notes()]
        self.growth = Growth(
            self._planner,
            self._launcher,
            body,
            choose_outer=any(len(process.pids) == 1 for process in image.processes.values()),
            announcer=announcer,
            first=self._init.puppet if self._init is not None else None,
        )
        self._stack.callback(self._end_tree)
        self._steps = self.growth.grow()
        body.notes += self._ends.notes
        self._making = Making(
            image, self._roots.open, self.contents.fd, self._ids.uid_here, self._ids.gid_here, self.policy
        )
        self._stack.callback(self._making.close)
        for file in image.taken_files.values():
            self._untaken[file.path.mntns].append(file)
        self._check_files({n.index for n in image.namespaces.values() if n.kind == "mnt" and n.external})

    def _check_files(self, where: Collection[int]) -> None:
        """Whether the files that the tree needs by name are here, in these mount namespaces.

        Raises:
            Refused: names all that are not, or that differ.
        """
        taken = [file for mntns in where for file in self._untaken.get(mntns, [])]
        blockers = [
            *files_here.check(self._image, where, self._roots.open, self.policy, self._written),
            *self._making.check(taken),
        ]
        if blockers:
            raise Refused(blockers)
        if self.policy.files == "any":
            strictly = dataclasses.replace(self.policy, files="same")
            accepted = files_here.check(self._image, where, self._roots.open, strictly, self._written)
            self._body.notes += [f"{one.subject}: {one.reason}; it is used all the same" for one in accepted]

    def _make_cgroups(self) -> CgroupMaking:
        """The cgroups of the tree, not made yet.

        Raises:
            Refused: they have no place here.
        """
        used = {index for process in self._image.processes.values() for index in process.cgroups}
        for process in self._image.processes.values():
            used.update(index for thread in process.threads for index in thread.cgroups or [])
        made = CgroupMaking(
            self._image.cgroups, used, self.policy.cgroup, self._ids.uid_here, self._ids.gid_here
        )
        lacking = list(made.check())
        if lacking:
            raise Refused(lacking)
        return made

    @contextmanager
    def _outer_network(self) -> Iterator[LocalFd]:
        """The network around the tree: the one that was given, or our own."""
        externals = {"net": "/proc/self/ns/net"} | given_namespaces(self._externals)
        with opened({"net": externals["net"]}) as fds:
            yield fds["net"]

    def _join_externals(self) -> None:
        """Move the launcher, and with it the whole tree, into the namespaces that were given."""
        with opened(given_namespaces(self._externals)) as fds:
            for kind, fd in fds.items():
                (number,) = self._launcher.send_fds([fd])
                try:
                    self._launcher.syscall(NR.setns, number, FLAGS[kind])
                except OSError as error:
                    path = self._externals[kind]
                    raise RebuildError(f"--external {kind}={path} may not be joined: {error}") from error
                self._launcher.syscall(NR.close, number)

    @_step
    def furnish(self) -> None:
        """What the namespaces of the tree hold, and its mounts; `contents` are filled."""
        self._keepers.furnish(self.contents.fd)
        self._terminals.open()
        mounted = [
            n.index
            for n in self._image.namespaces.values()
            if n.kind == "mnt" and not n.external and self._keepers.has_mounts(n.index)
        ]
        self._check_files(mounted)
        for mntns in list(self._untaken):
            self._make_files(mntns)

    def _make_files(self, mntns: int) -> None:
        """Make the files that came along for a mount namespace, if it has its mounts and they are not made yet."""
        if mntns in self._untaken and self._keepers.has_mounts(mntns):
            made = self._making.make(self._untaken.pop(mntns))
            self._body.notes += [f"{name} was made: it came along" for name in made]

    @_step
    def next_fill(self) -> Fill | None:
        """Grow until pages are wanted; None when the tree has grown."""
        return next(self._steps, None)

    @_step
    def memory_of(self, fill: Fill) -> Place:
        """Where the pages of a process are written that has just been born; what it holds is owned here."""
        space = self._image.spaces[fill.space]
        if (found := fresh(self._puppet_of(fill.space), space)) is not None:
            self._fresh[fill.space] = found
        return self._memory(fill.space)

    def _puppet_of(self, space: int) -> Puppet:
        return next(
            self.growth.grown[process.pids[0]].puppet
            for process in self._image.processes.values()
            if process.space == space
        )

    def _memory(self, space: int) -> Place:
        puppet = self._puppet_of(space)
        subject = f"memory of pid {puppet.pid}" + huge_pages.remark(
            huge_pages.sizes(self._image.spaces[space])
        )
        return MemoryPlace(puppet.pid, puppet.memory, self._fresh.get(space), subject)

    def _close_fresh(self) -> None:
        while self._fresh:
            self._fresh.popitem()[1].close()

    # -- a tree that was built from a draft -------------------------------------------------

    @_step
    def make_threads(self) -> None:
        """Those of the draft: of most programs they are those of the tree that it becomes."""
        finish.make_threads(self._image, self.growth, early=True)

    @_step
    def update(self, image: Image) -> bool:
        """The tree is as `image` says by now, but for what is absent.

        What outlives a process is made; then its pages come, then `change`.

        Returns:
            Whether what was built here can become that tree; else nothing has changed.

        Raises:
            RebuildError, Refused: it needs something by now that is not here.
        """
        self._close_fresh()
        mending = draft.mending(self._image, image)
        if mending.reasons:
            return False
        ids = Destination(image, self._terms.placing, self._terms.unmapped)
        ids.refuse_unplaced()
        blockers = list(check_here(list(image.processes.values())))
        if blockers:
            raise Refused(blockers)
        if changed := list(self._written.check(image, self._roots.open, self.policy)):
            raise Refused(changed)
        self.contents.update(image, self._launcher, ids.uid_here, ids.gid_here)
        self._before, self._image, self._ids, self._mending = self._image, image, ids, mending
        finish.end_threads(image, self.growth, mending.ended)
        return True

    @_step
    def change(self) -> None:
        """Turn the mappings of every process into those of the updated image, but for those that are new.

        The pages that differ come then, and by further steps of `next_fill` those that are new.
        """
        self.contents.seal_writing()
        files = MappedFiles(self._image, self.contents, self._open_path, self.policy, Written(live=False))
        self._stack.callback(files.close)
        self._body.update(self._image, files, self._ids)
        self.growth.mend(self._mending.ended, self._mending.births)
        self._steps = self.growth.grow()
        for pid, grown in self.growth.grown.items():
            process = self._image.processes[pid]
            if process.space is None or process.together.vm:
                continue
            before = self._before.spaces[process.space]
            if self._image.spaces[process.space] != delta.grown(before):
                self._body.change(process, grown, before)

    def place_of(self, space: int) -> Place:
        """Where the pages of any space are written; in any thread. What it holds is owned here.

        Raises:
            RebuildError: there is no such space.
        """
        if space in self.contents:
            return self.contents.place(space)
        if space not in self._image.spaces:
            raise RebuildError(f"pages of space {space}, which nothing in the tree has")
        return self._memory(space)

    @property
    def has_births(self) -> bool:
        """Whether there are processes that are born behind the last pages of those that stand."""
        return bool(self._mending.births.steps)

    def last_fills(self) -> list[int]:
        """The spaces of the processes that stand, in the order in which their last pages come."""
        standing = {self._image.processes[pid].space for pid in self.growth.grown}
        return [space for space in fill_order(self._planner.steps) if space in standing]

    @property
    def lacks_files(self) -> bool:
        """Whether files that came along are not made yet: that takes their contents."""
        return bool(self._untaken)

    @_step
    def equip_early(self, is_enough: Callable[[], bool] = lambda: False) -> bool:
        """Begin with what `complete` does, beside the last pages, if the processes that stand are all.

        Where it `lacks_files`, what outlives a process has its pages.

        Args:
            is_enough: asked between the steps: something else waits for the tracer.

        Returns:
            Whether there is nothing more to do of it.
        """
        return bool(self._mending.ended) or self.has_births or self._equip(is_enough)

    def _equip(self, is_enough: Callable[[], bool] = lambda: False) -> bool:
        """Threads, open files, directories: what touches no memory, nor bytes but those of `lacks_files`.

        Goes on where it was left; see `equip_early`.
        """
        if self._equipping is None:
            self._equipping = self._equipment()
        return not any(is_enough() for _ in self._equipping)

    def _equipment(self) -> Iterator[None]:
        image, growth = self._image, self.growth
        finish.make_threads(image, growth)
        for process, grown in finish.living(image, growth):
            self._cgroups.place_threads(process, [puppet.tid for puppet in grown.threads])
        growth.end_wardens()
        self._keepers.check_mounted()
        for mntns in list(self._untaken):
            self._make_files(mntns)
        puppets = {pid: grown.puppet for pid, grown in growth.grown.items()}
        for process, grown in finish.living(image, growth):
            tasks = [thread.pids[0] for thread in process.threads]
            puppets |= dict(zip(tasks, grown.threads, strict=True))
        descriptors = Descriptors(
            image,
            puppets,
            self.contents,
            self._roots.of,
            self._open_namespace,
            {
                n.index
                for n in image.namespaces.values()
                if n.kind in ("net", "ipc") and (not n.external or n.kind in self._externals)
            },
            self._ids.uid_here,
            self._ids.gid_here,
            {**self._terminals.made, **self._ends.made},
            self.policy,
            self._late,
            self._clocks,
        )
        self._descriptors = descriptors
        self._stack.callback(descriptors.close)
        yield from descriptors.create()
        yield from descriptors.install()
        yield from finish.set_directories(image, growth, descriptors.directory)

    @_step
    def complete(self) -> None:
        """Everything but letting it run."""
        self._close_fresh()
        self._equip()
        descriptors = self._descriptors
        assert descriptors is not None
        image, growth = self._image, self.growth
        self.contents.seal_rest()
        try:
            finish.complete_memory(image, growth)
            for process, grown in finish.living(image, growth):
                timers.make_timers(process, grown.puppet)
            descriptors.finish()
        finally:
            descriptors.close()
        growth.look_ahead()
        self._body.notes += finish.end_zombies(image, growth, self._give_ids)
        finish.stop_stopped(image, growth)
        self._watch_missing()
        registers: dict[int, list[bytes]] = {}
        for process, grown in finish.living(image, growth):
            space = image.spaces[process.space] if process.space is not None else None
            registers[process.pids[0]] = reinstate(
                self._as_our_child(process), space, grown.threads, self._ids.uid, self._ids.gid
            )
        for process, grown in finish.living(image, growth):
            if process.together.sysvsem:
                continue
            sets = self._keepers.ipc_state(process.namespaces.ipc).semaphores
            semaphore_undo.reinstate(process.undo, sets, grown.puppet.syscall)
        self._keepers.settle()
        self._keepers.set_limits()
        self._cgroups.settle()
        finish.put_on(image, growth, lambda process, index: registers[process.pids[0]][index])

    def _watch_missing(self) -> None:
        """From here on whoever touches a page that comes later waits for it, and who forks, until that is heard."""
        for process, grown in finish.living(self._image, self.growth):
            space = self._image.spaces[process.space] if process.space is not None else None
            if space is None or not space.later or process.together.vm:
                continue
            if not self._terms.later:
                raise ImageError(f"pages of space {space.space} are elsewhere: this is no image of its own")
            pid = grown.puppet.pid
            self._watched.append(Watched(pid, space.space, watch(grown.puppet, space), space.later))

    def take_watched(self) -> list[Watched]:
        """What watches the missing pages of the tree; the caller owns it, and answers until they are there."""
        watched, self._watched = self._watched, []
        return watched

    def _close_watched(self) -> None:
        while self._watched:
            fd = self._watched.pop().fd
            os.close(fd)
            LEDGER.give_back(ENTRY, fd)

    def victims(self) -> list[HostPid]:
        """Whose end is the end of the tree: every process of it, and the first one around it."""
        found = [grown.puppet.pid for _, grown in finish.living(self._image, self.growth)]
        return found if self._init is None else [self._init.puppet.pid, *found]

    def killed(self) -> list[HostPid]:
        """Processes of what was built that have ended, and not by a step of ours."""
        puppets = list(self.growth.puppets()) if hasattr(self, "growth") else []
        puppets += [self._init.puppet] if self._init is not None else []
        return [one.pid for one in puppets if one.is_held and procfs.is_exiting(HostPid(one.tid))]

    def _as_our_child(self, process: Process) -> Process:
        """Without the signal at the end of its parent, if that is us and we end before it."""
        is_root = process.pids[0] == self._image.head.root
        stays = self.policy.parent_stays or self._init is not None
        if not is_root or stays or not any(thread.pdeathsig for thread in process.threads):
            return process
        self._body.notes.append(
            f"pid {process.pids[0]}: no signal will be sent to it at the end of its parent, which is this command"
        )
        return replace(process, threads=[replace(thread, pdeathsig=0) for thread in process.threads])

    def thaw(self) -> HostPid:
        """Let the tree run; returns the pid of its root here. There is no way back.

        What goes wrong with its connections now is said by `notes`.

        Raises:
            RebuildError: somebody has killed it, or a part of it, just now: nothing of it is left.
        """
        root = self.root_pid
        self._thawed = True
        try:
            self._keepers.connect_networks()
        except (OSError, RebuildError) as error:  # the source may be gone already: the tree runs all the same
            self._body.notes.append(str(error))
        self._body.notes += self._late.run()
        try:
            if self._init is not None:
                self._init.set_free(
                    procfs.status(root).ns_pid[1], leaves_session=self._image.head.job is None
                )
            self.runs_since_s = finish.thaw(self._image, self.growth)
        except (OSError, PipelineError) as error:
            self._end_all()
            raise RebuildError(f"the tree was ended when it was about to run ({error})") from error
        except BaseException:
            self._end_all()
            raise
        self._cgroups.keep()
        self._making.keep()
        try:
            self._ends.start()
        except RebuildError as error:
            self._body.notes.append(str(error))
        return root

    def _end_all(self) -> None:
        """End what runs already; the rest is ended, and all of it collected, by `close`."""
        self._thawed = False
        for pid in self.victims():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._collected = self.child_pid

    def _collect(self) -> None:
        if self._collected is not None:
            with suppress(ChildProcessError):  # it was still a puppet
                os.waitpid(self._collected, 0)

    @property
    def notes(self) -> list[str]:
        """What is not as it was, and stops nothing; complete when the tree is."""
        return self._body.notes

    @property
    def given(self) -> list[int]:
        """Descriptors of this process that took the place of ends outside of the tree."""
        return self._ends.given

    @property
    def foreground(self) -> int:
        """The process group, as it is called here, that a job of a shell had in the foreground; 0: one led outside."""
        job = self._image.head.job
        if job is not None and job.foreground:
            for process in self._image.processes.values():
                if process.pgid == job.foreground:
                    return os.getpgid(self.growth.grown[process.pids[0]].puppet.pid)
        return 0

    @property
    def root_pid(self) -> HostPid:
        """The root of the tree."""
        return self.growth.grown[self._image.head.root].puppet.pid

    @property
    def child_pid(self) -> HostPid:
        """Our child that ends with the root of the tree: the first process around it, or the root itself."""
        if self._init is not None:
            return self._init.puppet.pid
        return self.root_pid

    def _end_init(self) -> None:
        if self._init is not None and not self._thawed:
            self._init.puppet.kill_and_reap()

    def close(self) -> None:
        """Give everything back, the tree too unless it was thawed; idempotent."""
        self._stack.close()

    def _give_ids(self, process: Process, grown: Grown) -> None:
        """The ids of a zombie; of its namespaces only the user namespace outlives it."""
        self._cgroups.place(process, grown.puppet.pid)
        wanted = process.credentials
        if wanted is None:
            return
        if wanted.userns != grown.members.user:
            self._keepers.join_owner(grown.puppet, wanted.userns)
        now = procfs.status(grown.puppet.tid)
        grown.puppet.run_checked(list(credentials.after_join(wanted, self._ids.uid, self._ids.gid, now)))

    # -- translations and paths -------------------------------------------------------------

    def _root_path(self, mntns: int) -> str:
        path = self._keepers.root_path(mntns)
        if path == "/" and self._init is not None:
            return f"/proc/{self._init.puppet.pid}/root"
        return path

    def _open_path(self, path: PathRef, flags: int) -> LocalFd:
        self._make_files(path.mntns)
        return self._roots.open(path, flags)

    def _open_namespace(self, kind: str, index: int) -> LocalFd:
        """A namespace of the image as an open file; the caller owns it."""
        pid = self.growth.first_of(index) if kind == "pid" else self._keepers.seat_of(kind, index)
        link = "time_for_children" if kind == "time" else kind
        return LocalFd(os.open(f"/proc/{pid}/ns/{link}", os.O_RDONLY | os.O_CLOEXEC))

    # -- what is held ---------------------------------------------------------------------------

    def _end_launcher(self) -> None:
        self._launcher.stage.end()
        self._launcher.stage.channel.close()

    def _end_tree(self) -> None:
        if not self._thawed:
            self.growth.kill_all()

    def _channel_fd(self) -> int:
        spare = draft.SPARE_DESCRIPTORS if self._terms.live else 0
        own = numbers.puppet_descriptors(self._image, spare)
        needed = max(own.stop, max(numbers.descriptors(self._image), default=0) + 1)
        may_have, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if may_have < needed:
            raise RebuildError(
                f"this restorer may have {may_have} descriptors open, and needs numbers up to {needed - 1}: "
                "raise `ulimit -n`"
            )
        return own.start
