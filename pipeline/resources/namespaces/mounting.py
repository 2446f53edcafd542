"""The order in which the mounts of a tree are made again, over all of its mount namespaces.

Each namespace's steps are done in order, as far as they go. A step waits for what it shows: a proc for the first
process of its pid namespace, a copy of a mount for the namespace that mounts it, a namespace file for the namespace.
So every namespace is gone through again whenever something new is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

from pipeline.errors import ImageError, RebuildError
from pipeline.ids import LocalFd
from pipeline.kernel.syscalls import open_tree
from pipeline.ledger import LEDGER
from pipeline.remote.puppet import Puppet
from pipeline.resources.namespaces import idmapped, mounts, tmpfs
from pipeline.resources.namespaces.idmapped import MountIdmap
from pipeline.resources.namespaces.mounts import Step
from pipeline.resources.namespaces.seats import Seats, join
from pipeline.userns.forest import Forest
from pipeline.userns.idmap import MapError
from pipeline.userns.visit import become, fetch, visit


class Mounting:
    """What is still to be mounted where.

    Args:
        seats: of the mount namespaces, which exist, and of what their mounts show.
        forest: for the ids of files.
    """

    def __init__(self, seats: Seats, forest: Forest) -> None:
        self._seats = seats
        self._forest = forest
        self._to_do: dict[int, Sequence[Step]] = {}
        self._firsts: dict[int, Puppet] = {}
        self._copies: dict[int, tuple[int, Callable[[], None]]] = {}
        self._instances: dict[int, LocalFd] = {}
        self._contents: Callable[[int], LocalFd] | None = None

    def close(self) -> None:
        """Let go of the copies of mounts; idempotent."""
        while self._instances:
            _, fd = self._instances.popitem()
            os.close(fd)
            LEDGER.give_back("mount", fd)

    def add(
        self,
        mntns: int,
        steps: Sequence[Step],
        *,
        after: int | None = None,
        begin: Callable[[], None] | None = None,
    ) -> None:
        """Remember the steps of a mount namespace.

        Args:
            after: the mount namespace that it is a copy of, and whose steps have to be done before.
            begin: makes it then.
        """
        self._to_do[mntns] = steps
        if after is not None and begin is not None:
            self._copies[mntns] = after, begin

    def begin(self, contents: Callable[[int], LocalFd]) -> None:
        """Do what needs no process of the tree.

        Args:
            contents: the bytes of the files of a tmpfs, by space: complete; the descriptors stay their owner's.

        Raises:
            RebuildError: the kernel refuses a step; says which.
        """
        self._contents = contents
        self._go_on()

    def learn_first(self, pidns: int, first: Puppet) -> None:
        """Go on with what waited for `first`, the first process of pid namespace `pidns`; raises as `begin` does."""
        self._firsts[pidns] = first
        self._go_on()

    def check_done(self) -> None:
        """Nothing waits any more.

        Raises:
            RebuildError: what something waits for never came; the image is wrong.
        """
        left = [mntns for mntns, steps in self._to_do.items() if steps or mntns in self._copies]
        if left:
            raise RebuildError(f"mount namespace {left[0]} shows something that is not in the image")

    def is_done(self, mntns: int) -> bool:
        """Whether a mount namespace has all of its mounts."""
        return mntns not in self._copies and not self._to_do.get(mntns)

    def _go_on(self) -> None:
        before = None
        while before != (now := (len(self._copies), sum(map(len, self._to_do.values())))):
            before = now
            for mntns in self._to_do:
                if self._begun(mntns):
                    while self._to_do[mntns] and self._do(self._to_do[mntns][0], mntns):
                        self._to_do[mntns] = self._to_do[mntns][1:]

    def _begun(self, mntns: int) -> bool:
        """Whether a namespace is there; one that is a copy is made when it can be."""
        if mntns in self._copies:
            original, begin = self._copies[mntns]
            left = [step for step in self._to_do.get(original, ()) if not mounts.comes_behind_copies(step)]
            if left or original in self._copies:
                return False
            begin()
            del self._copies[mntns]
        return True

    def _do(self, step: Step, mntns: int) -> bool:
        """Do a step, unless it has to wait."""
        keeper = self._seats.of(mntns, "mnt")
        if step.what == "attach":
            if step.instance not in self._instances:
                return False
            mounts.attach(step, keeper, self._instances[step.instance])
        elif step.what == "fill":
            self._fill(step, mntns)
        elif step.what == "namespace":
            return self._bind_namespace(step, keeper)
        elif step.idmap is not None:
            self._bind_mapped(step, step.idmap, mntns)
        elif step.late is None:
            if step.shows is not None:
                kind = mounts.SHOWN.get(step.kind, "ipc")
                join(keeper, self._seats.of(step.shows, kind), kind)
            mounts.do(step, keeper)
        elif step.late in self._firsts:
            self._mount_inside(step, keeper, self._firsts[step.late])
        else:
            return False
        if step.what == "mount" and step.instance:
            self._share(step, mntns)
        return True

    def _bind_namespace(self, step: Step, keeper: Puppet) -> bool:
        """Bind a namespace file, unless the namespace is still to be made."""
        if step.shows is None:
            raise ImageError(f"mount {os.fsdecode(step.point)} of the image shows no namespace")
        kind = step.kind.decode(errors="replace")
        if kind == "pid" and step.shows in self._firsts:
            holder: Puppet | None = self._firsts[step.shows]
        else:
            holder = self._seats.found(kind, step.shows)
        if holder is None:
            return False
        with self._seats.opened(holder, kind) as namespace:
            mounts.bind_namespace(step, keeper, namespace)
        return True

    def _bind_mapped(self, step: Step, wanted: MountIdmap, mntns: int) -> None:
        """Bind what another mount shows, with its ids as others."""
        try:
            with self._seats.way_into(mntns) as way:
                detached = fetch(way, lambda: open_tree(-100, step.source))
            try:
                idmapped.create(detached, wanted, self._seats.user[0], partial(self._forest.map_of, 0))
                mounts.attach(step, self._seats.of(mntns, "mnt"), detached)
            finally:
                os.close(detached)
        except (OSError, MapError) as error:
            raise RebuildError(
                f"idmapped mount {os.fsdecode(step.point)} of mount namespace {mntns}: {error} (it takes root "
                "of the initial user namespace)"
            ) from error

    @staticmethod
    def _mount_inside(step: Step, keeper: Puppet, first: Puppet) -> None:
        """Let a child of the first process of a pid namespace do a step: what it mounts shows that namespace."""
        helper = first.clone()
        try:
            join(helper, keeper, "mnt")
            mounts.do(step, helper)
        finally:
            helper.kill_and_reap()
            first.reap_children()

    def _share(self, step: Step, mntns: int) -> None:
        """Keep a copy of the mount that has just been made, for other mount namespaces."""
        with self._seats.way_into(mntns) as way:
            fd = fetch(way, lambda: open_tree(-100, step.point))
        LEDGER.take("mount", fd)
        self._instances[step.instance] = fd

    # -- tmpfs --------------------------------------------------------------------------

    def _fill(self, step: Step, mntns: int) -> None:
        """Let a visitor fill the tmpfs that has just been mounted."""
        tmpfs.check(step.entries)
        owner = self._seats.records[mntns].owner
        where = f"the tmpfs at {os.fsdecode(step.point)} of mount namespace {mntns}"
        owners = [self._owner(entry, owner, where) for entry in step.entries]
        ids = self._forest.makers_ids(owner)
        assert self._contents is not None
        content = self._contents(step.space) if step.space else LocalFd(-1)

        def work() -> bytes:
            tmpfs.Place(step.point).enter()  # those ids may not get through the directories above it
            if owner:
                become(*ids)
            return tmpfs.fill(step.entries, owners, content)

        try:
            with self._seats.way_into(mntns) as way:
                visit(way, work)
        except OSError as error:
            raise RebuildError(f"{where} cannot be filled: {error.strerror}{mounts.hint(error)}") from error

    def _owner(self, entry: tmpfs.Entry, userns: int, where: str) -> tuple[int, int]:
        """Owner and group of an entry, as numbers in a user namespace."""
        found = [
            self._forest.number_in(entry.uid, userns, "uid"),
            self._forest.number_in(entry.gid, userns, "gid"),
        ]
        if None in found:
            name = os.fsdecode(entry.path)
            raise RebuildError(
                f"{where}: {name} belongs to {entry.uid.id}:{entry.gid.id}, who has no number here"
            )
        return cast(tuple[int, int], tuple(found))
