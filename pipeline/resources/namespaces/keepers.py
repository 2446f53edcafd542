"""Making namespaces again: one keeper for each, alive until the tree has moved in.

A keeper is a helper puppet that has made a namespace and stays in it. A user namespace's
keeper is cloned from its parent's, becomes the owner that the image names, and unshares;
then the *parent's* keeper writes the maps, because that is who may: an id map is
written once, by somebody in the parent (or the namespace itself) with the right
capabilities there. No step passes through an id that a map lacks.

The keepers of other namespaces are cloned from the keeper of the user namespace that
shall own them. Keepers stay in the host's pid namespace and see its /proc.

Every keeper is claimed (registered for its end) before it is used; ending a keeper lets
go of its namespace. Sources: user_namespaces(7), setns(2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd
from pipeline.image.schema import Memberships, Namespace, NamespaceKind, UserNamespace
from pipeline.kernel.arch.x86_64 import NR, call_name
from pipeline.kernel.syscalls import CLONE, PRCTL
from pipeline.remote.calls import Call
from pipeline.remote.files import put
from pipeline.remote.puppet import Puppet
from pipeline.resources.cgroups.making import CgroupMaking
from pipeline.resources.namespaces import cgroups, clocks, ipc, mounts, names, network, pids
from pipeline.resources.namespaces.flags import FLAGS
from pipeline.resources.namespaces.ipc_making import IpcMaking, Number
from pipeline.resources.namespaces.mounting import Mounting
from pipeline.resources.namespaces.outside_links import OutsideLinks
from pipeline.resources.namespaces.seats import Seats, join
from pipeline.resources.support import Support
from pipeline.userns.externals import GivenDevice
from pipeline.userns.forest import Forest, IdKind
from pipeline.userns.idmap import MapError

SUPPORT = Support(
    "user",
    carried=(
        "any nesting and any map, one not written yet, too",
        "owner, setgroups, projid_map, limits of /proc/sys/user",
        "ids that have no number there",
        "one that only a descriptor, a mount or another namespace holds",
    ),
    refused=("one that is not below the pipeline's own",),
    shown_by=(
        "topologies/test_topologies.py",
        "programs/levels.py",
    ),
)

_NO_SETUID_FIXUP = 1 << 2
_KEEP_CAPS = 1 << 4
#: groups first: whoever has given up the uid may not be allowed to change them
_SET_IDS: tuple[tuple[IdKind, int], ...] = (("gid", NR.setresgid), ("uid", NR.setresuid))
#: joined in this order, the user namespace behind them
_JOINABLE: tuple[NamespaceKind, ...] = ("uts", "ipc", "net", "cgroup", "time", "mnt")


def _network_of(puppet: Puppet) -> LocalFd:
    return LocalFd(os.open(f"/proc/{puppet.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))


class Keepers:
    """The namespaces of an image, made again.

    Args:
        launcher: a puppet in the external namespaces, with all capabilities in its user namespace.
        forest: the user namespaces, with their maps as the destination wants them.
        claims: ends the keepers, in reverse order.
        number: what ids are called, with the policy for those that have no place; the forest's answer by default.
        around: the first process of a pid namespace made around the tree; its mounts, with a /proc of that
            namespace, are those that mount namespaces begin as a copy of.
        given: what devices of the tree's networks shall hang on outside.
        cgroups: of the tree.
    """

    def __init__(
        self,
        launcher: Puppet,
        forest: Forest,
        claims: ExitStack,
        around: Puppet | None = None,
        number: Number | None = None,
        given: Sequence[GivenDevice] = (),
        cgroups: CgroupMaking | None = None,
    ) -> None:
        self._cgroups = cgroups or CgroupMaking({}, set(), "ignore", lambda one: one.id, lambda one: one.id)
        self._forest = forest
        self._claims = claims
        self._around = around
        self.seats = Seats({0: launcher}, around or launcher)
        self._mounting = Mounting(self.seats, forest)
        claims.callback(self._mounting.close)
        self._networks: dict[int, network.NetState] = {}
        self._ipc = IpcMaking(self.seats, forest, number or forest.number_in)
        self._outside = OutsideLinks(given, lambda: _network_of(launcher))

    def make(self, namespaces: Mapping[int, Namespace], begun_later: Collection[int] = ()) -> None:
        """Make every user namespace, and every other one but pid namespaces, which begin with a process.

        Args:
            namespaces: by index.
            begun_later: time namespaces that processes of the tree have to make themselves (`begin_time`).

        Raises:
            RebuildError: the kernel refuses a step; says which namespace.
        """
        for userns in sorted(self._forest.namespaces.values(), key=self._depth):
            if userns.index:
                try:
                    self._make_user(userns)
                except (OSError, MapError) as error:
                    raise RebuildError(f"user namespace {userns.index}: {error}") from error
        self.seats.records.update(namespaces)
        others = [
            n
            for n in namespaces.values()
            if not n.external and n.kind != "pid" and n.index not in begun_later
        ]
        for namespace in sorted(others, key=lambda n: n.kind == "mnt"):  # mounts may show an ipc namespace
            try:
                self._make_other(namespace)
            except (OSError, msgspec.ValidationError) as error:
                raise RebuildError(f"{namespace.kind} namespace {namespace.index}: {error}") from error
        self._claims.callback(self._outside.close)
        try:
            network.create(
                self._networks,
                self._open_network,
                self.seats.way_into,
                self._outside,
                lambda one, kind: self._forest.number_in(one, 0, kind),
            )
        except OSError as error:
            raise RebuildError(f"network namespaces: {error}") from error

    def _open_network(self, index: int) -> LocalFd:
        return _network_of(self.seats.other[index])

    def connect_networks(self) -> None:
        """Bring up what the tree's networks hang on outside; see `OutsideLinks.connect`."""
        self._outside.connect(self._networks, self._open_network)

    def set_limits(self) -> None:
        """Set the limits of /proc/sys/user; last of all, because they may forbid what was made here.

        Raises:
            RebuildError: a name is no limit, or the kernel refuses a value.
        """
        for index, userns in self._forest.namespaces.items():
            for name, value in userns.limits.items():
                if not userns.index or name not in os.listdir("/proc/sys/user"):
                    raise RebuildError(f"user namespace {index}: this kernel has no limit {name}")
                try:
                    put(self.seats.user[index], f"/proc/sys/user/{name}", b"%d" % value)
                except OSError as error:
                    raise RebuildError(
                        f"user namespace {index}: {name} may not be {value}: {error}"
                    ) from error

    def _depth(self, userns: UserNamespace) -> int:
        return len(list(self._forest.ancestors(userns.index)))

    def _clone(self, creator: Puppet) -> Puppet:
        keeper = creator.clone(CLONE.PARENT)
        self._claims.callback(keeper.kill_and_reap)
        return keeper

    def _make_user(self, userns: UserNamespace) -> None:
        assert userns.parent is not None
        above = self.seats.user[userns.parent]
        keeper = self._clone(above)
        self._become_owner(userns, keeper)
        keeper.syscall(NR.unshare, CLONE.NEWUSER)
        self.seats.user[userns.index] = keeper
        if userns.setgroups == "deny":
            put(above, f"/proc/{keeper.pid}/setgroups", b"deny")
        elif Path(f"/proc/{keeper.pid}/setgroups").read_bytes().strip() == b"deny":
            raise RebuildError(
                f"user namespace {userns.index}: setgroups was allowed in it, and is denied to whatever is made here"
                " (restore as root, or with newgidmap and a range in /etc/subgid)"
            )
        kinds: tuple[IdKind, ...] = ("gid", "uid", "projid")
        for kind in kinds:
            name, text = f"{kind}_map", self._forest.lines_of(userns.index, kind).text()
            if text:
                try:
                    put(above, f"/proc/{keeper.pid}/{name}", text)
                except OSError as error:
                    raise RebuildError(
                        f"user namespace {userns.index}: {name} `{text.decode()}` is refused: {error}; each line "
                        "has to lie within one line of the map around it"
                    ) from error

    def _become_owner(self, userns: UserNamespace, keeper: Puppet) -> None:
        """Take the creator's id: the kernel remembers it, and wants it to be mapped where it is."""
        assert userns.parent is not None
        owner = userns.owner
        uid = self._forest.number_in(owner, userns.parent, "uid") if owner is not None else None
        gid = self._first_gid(userns.parent)
        calls = [
            Call(NR.prctl, (PRCTL.SET_SECUREBITS, _NO_SETUID_FIXUP | _KEEP_CAPS, 0, 0, 0), name="securebits")
        ]
        if userns.parent != 0 and gid is not None:
            calls.append(Call(NR.setresgid, (gid, gid, gid), name="setresgid"))
        if uid is not None:
            calls.append(Call(NR.setresuid, (uid, uid, uid), name="setresuid"))
        calls.append(Call(NR.prctl, (PRCTL.SET_DUMPABLE, 1, 0, 0, 0), name="dumpable"))
        keeper.run_checked(calls)

    def _become_root_inside(self, userns: int, keeper: Puppet) -> None:
        """Take ids 0 in the user namespace that the keeper is in, as far as it is one of ours and maps them."""
        if userns == 0:
            return
        calls = [
            Call(number, (0, 0, 0), name=call_name(number))
            for kind, number in _SET_IDS
            if self._forest.map_of(userns, kind).up(0) is not None
        ]
        keeper.run_checked([*calls, Call(NR.prctl, (PRCTL.SET_DUMPABLE, 1, 0, 0, 0), name="dumpable")])

    def _first_gid(self, userns: int) -> int | None:
        """Any gid that is mapped in a namespace: the kernel only asks that the creator's is."""
        extents = self._forest.map_of(userns, "gid").extents
        return extents[0].inner if extents else None

    def _make_other(self, namespace: Namespace) -> None:
        if namespace.kind == "mnt":
            self._make_mounts(namespace)
            return
        keeper = self._clone(self.seats.user[namespace.owner])
        if namespace.kind == "ipc":  # the root of its message queues will belong to the maker
            self._become_root_inside(namespace.owner, keeper)
            self._ipc.add(namespace.index, msgspec.convert(namespace.state, ipc.IpcState))
        if namespace.kind == "cgroup":
            roots = msgspec.convert(namespace.state, cgroups.CgroupNamespaceState).roots
            with self._cgroups.visiting(roots, keeper.pid):
                keeper.syscall(NR.unshare, FLAGS[namespace.kind])
        elif namespace.kind != "time":
            keeper.syscall(NR.unshare, FLAGS[namespace.kind])
        self.seats.other[namespace.index] = keeper
        match namespace.kind:
            case "time":
                clocks.begin(msgspec.convert(namespace.state, clocks.TimeState), keeper)
            case "net":
                self._networks[namespace.index] = msgspec.convert(namespace.state, network.NetState)
            case "cgroup" | "ipc":
                pass  # the one begins where its keeper was; the other is furnished later
            case "uts":
                names.create_uts(msgspec.convert(namespace.state, names.UtsState), keeper)
            case _:
                raise RebuildError(f"{namespace.kind} namespaces are not carried")

    def _make_mounts(self, namespace: Namespace) -> None:
        """Make a mount namespace, or have it made when the one that it is a copy of has its mounts."""
        state = msgspec.convert(namespace.state, mounts.MountState)
        if state.base is not None:
            base = state.base
            self._mounting.add(
                namespace.index,
                state.steps,
                after=base,
                begin=lambda: self._copy_mounts(namespace, state, self.seats.of(base, "mnt")),
            )
            return
        self._copy_mounts(namespace, state, self._around)
        self._mounting.add(namespace.index, state.steps)

    def _copy_mounts(self, namespace: Namespace, state: mounts.MountState, original: Puppet | None) -> None:
        """Make a mount namespace as a copy of the one that `original` is in; None: of the launcher's."""
        if original is None:
            keeper = self._clone(self.seats.user[namespace.owner])
        else:
            keeper = self._clone(self.seats.user[0])
            join(keeper, original, "mnt")
            if namespace.owner:
                join(keeper, self.seats.user[namespace.owner], "user")
        self._stay_on_one_processor(keeper)
        keeper.syscall(NR.unshare, FLAGS["mnt"])
        self.seats.other[namespace.index] = keeper
        mounts.begin(state, keeper)

    @staticmethod
    def _stay_on_one_processor(keeper: Puppet) -> None:
        """So that mount namespaces are numbered in order: a file of one can only be bound in one with a lower number.

        Each processor has a supply of numbers of its own.
        """
        mask = (1 << min(os.sched_getaffinity(0))).to_bytes(128, "little")
        keeper.syscall(NR.sched_setaffinity, 0, len(mask), mask)

    def has_mounts(self, mntns: int) -> bool:
        """See `Mounting.is_done`."""
        return self._mounting.is_done(mntns)

    def check_mounted(self) -> None:
        """See `Mounting.check_done`."""
        self._mounting.check_done()

    def furnish(self, contents: Callable[[int], LocalFd]) -> None:
        """Make what namespaces hold, and do the mounts, as far as they need no process of the tree.

        Args:
            contents: the bytes of segments and of the files of a tmpfs, by space: complete; the descriptors stay
                their owner's.

        Raises:
            RebuildError: the kernel refuses a step; says which.
        """
        self._ipc.create(contents)
        self._mounting.begin(contents)

    def settle(self) -> None:
        """What namespaces hold becomes what it was, once processes have what they need of it."""
        self._ipc.settle()

    def ipc_state(self, index: int) -> ipc.IpcState:
        """What an ipc namespace of the tree holds; nothing, for one that is not the tree's."""
        return self._ipc.state(index)

    def begin_time(self, timens: int, puppet: Puppet) -> None:
        """Let a process of the tree make time namespace `timens` for its children.

        Raises:
            RebuildError: the kernel refuses it.
        """
        try:
            clocks.begin(msgspec.convert(self.seats.records[timens].state, clocks.TimeState), puppet)
        except (OSError, msgspec.ValidationError) as error:
            raise RebuildError(f"time namespace {timens}: {error}") from error
        self.seats.other[timens] = puppet

    def choose_empty_pids(self, pidns: int, puppet: Puppet) -> None:
        """Let a process of the tree choose a pid namespace for its children in which nobody lives.

        Raises:
            RebuildError: the kernel refuses it.
        """
        try:
            pids.choose_empty(msgspec.convert(self.seats.records[pidns].state, pids.PidState), puppet)
        except (OSError, msgspec.ValidationError) as error:
            raise RebuildError(f"pid namespace {pidns}: {error}") from error

    # -- moving in --------------------------------------------------------------------

    def root_path(self, mntns: int) -> str:
        """A path to the root of a mount namespace, for the pipeline to open."""
        keeper = self.seats.other.get(mntns)
        return f"/proc/{keeper.pid}/root" if keeper is not None else "/"

    def seat_of(self, kind: str, index: int) -> int:
        """The pid here of somebody in a namespace that is not of kind pid: a user namespace's, or another's number."""
        seat = self.seats.found(kind, index)
        if seat is None:
            raise RebuildError(f"{kind} namespace {index} is not made yet")
        return seat.pid

    def join_owner(self, helper: Puppet, userns: int) -> None:
        """Move a helper into a user namespace."""
        join(helper, self.seats.user[userns], "user")

    def join(self, puppet: Puppet, now: Memberships, wanted: Memberships) -> None:
        """Move a puppet from the namespaces it is in to those it shall be in; the user namespace comes last.

        The kernel wants CAP_SYS_ADMIN in the owner of each, which a puppet has as long as it sits in an
        ancestor of the owner: it does until it has joined its own.

        Raises:
            RebuildError: setns is refused; says for which kind.
        """
        for kind in _JOINABLE:
            index = getattr(wanted, kind)
            if index != getattr(now, kind):
                if index not in self.seats.other:
                    raise RebuildError(f"puppet {puppet.pid} cannot go back to the external {kind} namespace")
                join(puppet, self.seats.other[index], kind)
        if wanted.user != now.user:
            join(puppet, self.seats.user[wanted.user], "user")

    def mount_late(self, pidns: int, first: Puppet) -> None:
        """Go on with the mounts that waited for the first process of a pid namespace; see `Mounting.learn_first`."""
        self._mounting.learn_first(pidns, first)
