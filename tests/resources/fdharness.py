"""Real processes with open files, and the two scopes that kinds are given, outside of the engine.

`subject` forks a process that opens things and waits. `Capture` looks at its descriptors
as the engine does (pidfd_getfd, fdinfo) and makes records, which pass through msgpack.
`Rebuilt` makes the open files again in this process and, for the last phase, in puppets:
real stopped processes that run what is injected.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from pipeline.errors import Blocker, RebuildError
from pipeline.ids import HostPid, LocalFd, RemoteAddress
from pipeline.image.schema import Id, OpenFile, PathRef
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.procfs import parse_fdinfo
from pipeline.kernel.syscalls import CLONE, KCMP, RESOLVE, kcmp, openat2, pidfd_getfd, pidfd_open
from pipeline.policy import DumpPolicy, RestorePolicy
from pipeline.remote.calls import Argument, Call
from pipeline.remote.puppet import Puppet, spawn_launcher
from pipeline.resources import (
    device,
    directory,
    epoll,
    eventfd,
    fanotify,
    fifo,
    in_flight,
    inotify,
    kernel_files,
    memfd,
    mqueue,
    opath,
    pidfd,
    pipes,
    pty_sides,
    regular,
    signalfd,
    timerfd,
    unnamed,
    unsupported,
)
from pipeline.resources.held import Held
from pipeline.resources.kinds import FdView, Inject
from pipeline.resources.outside import Outsiders
from pipeline.resources.shielded import Shield
from pipeline.resources.socket_identity import Identity
from pipeline.resources.sockets import EXTERNAL_NETWORK
from pipeline.resources.unix_unread import Unread
from pipeline.stages.late import Late

#: in the order of the registry: the last one matches everything
_MODULES: list[Any] = [opath, memfd, kernel_files, unnamed, regular, directory, device, fifo, mqueue, pipes]
_MODULES += [eventfd, timerfd, signalfd, pidfd, inotify, fanotify, epoll, unsupported]
KINDS: list[Any] = [module.KIND for module in _MODULES]
#: the subject's own descriptors that are not looked at
_CONTROL = 900
#: flags that a file without a name loses
_LOST = os.O_TMPFILE | os.O_NOFOLLOW
_SCRATCH = RemoteAddress(0x10_0000_0000)
_CHANNEL = 1000
_THREAD = CLONE.VM | CLONE.FS | CLONE.FILES | CLONE.SIGHAND | CLONE.THREAD | CLONE.SYSVSEM
T = TypeVar("T")


class Subject:
    """A child that holds what its setup opened: `result` is what the setup returned."""

    def __init__(self, pid: int, result: Any, command: int, answer: int) -> None:
        self.pid = HostPid(pid)
        self.result = result
        self._command, self._answer = command, answer

    def call(self, function: Callable[[], Any]) -> Any:
        """Run a picklable (module-level) function in the subject."""
        os.write(self._command, pickle.dumps(function))
        return _answer(self._answer)


def _answer(fd: int) -> Any:
    kind, value = pickle.loads(os.read(fd, 65536) or pickle.dumps(("gone", None)))
    if kind != "ok":
        raise RuntimeError(f"the subject failed: {value}")
    return value


@contextmanager
def subject(setup: Callable[[], Any]) -> Iterator[Subject]:
    """Fork a process without inherited descriptors but 0-2 on /dev/null; ends it and its children at exit."""
    command_r, command_w = os.pipe()
    answer_r, answer_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_subject(setup, command_r, answer_w)
    os.close(command_r)
    os.close(answer_w)
    try:
        yield Subject(pid, _answer(answer_r), command_w, answer_r)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with suppress(ChildProcessError):  # its own children, where this process is a subreaper
            while True:
                os.waitpid(-pid, 0)
        os.close(command_w)
        os.close(answer_r)


def _run_subject(setup: Callable[[], Any], command: int, answer: int) -> None:
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        command, answer = (
            fcntl.fcntl(command, fcntl.F_DUPFD, _CONTROL),
            fcntl.fcntl(answer, fcntl.F_DUPFD, _CONTROL),
        )
        os.closerange(0, _CONTROL)
        os.open("/dev/null", os.O_RDWR)
        os.dup(0)
        os.dup(0)
        os.write(answer, pickle.dumps(("ok", setup())))
        while request := os.read(command, 65536):
            os.write(answer, pickle.dumps(("ok", pickle.loads(request)())))
    except BaseException:  # noqa: BLE001 - it is reported, and the process ends
        with suppress(OSError):
            os.write(answer, pickle.dumps(("failed", traceback.format_exc())))
    finally:
        sys.stdout = sys.stderr = None
        os._exit(0)


class Capture:
    """A `CaptureScope` of the given processes (all of the tree); a context manager.

    Args:
        pids: the members; a process that is left out is outside the tree.
    """

    def __init__(self, *pids: int, policy: DumpPolicy | None = None) -> None:
        self.policy = policy or DumpPolicy()
        self.unseen = False
        self.still = True
        self.held = Held()
        self.shield = Shield()
        self.pids = [HostPid(pid) for pid in pids]
        self._stack = ExitStack()
        self._peers: dict[Any, Any] = {}
        self.contents: dict[int, bytes] = {}
        self.memories: dict[int, dict[str, Any]] = {}
        self._views: list[FdView] = []
        self._tables: dict[tuple[int, int], int] = {}
        self._unread: dict[int, list[Unread]] = {}
        #: what is in the way of looking at what is in flight
        self.found_in_flight: list[Blocker] = []

    def __enter__(self) -> Self:
        self._views.clear()
        self._tables.clear()
        self._peers.clear()
        for pid in self.pids:
            pidfd_local = pidfd_open(pid)
            self._stack.callback(os.close, pidfd_local)
            for number in sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd")):
                if number < _CONTROL:
                    self._take(pid, pidfd_local, number)
        for found in in_flight.gather(self._views, self._adopt):
            if isinstance(found, Blocker):
                self.found_in_flight.append(found)
            else:
                self._unread[found[0]] = found[1]
        return self

    def _adopt(self, local: LocalFd, queue: FdView) -> int:
        self._stack.callback(os.close, local)
        me = HostPid(os.getpid())
        for index, view in enumerate(self._views):
            if kcmp(me, me, KCMP.FILE, local, view.local) == 0:
                return index
        number = -1 - len(self._views)
        info = parse_fdinfo(Path(f"/proc/self/fdinfo/{local}").read_bytes())
        link = os.readlink(f"/proc/self/fd/{local}".encode())
        flags = fcntl.fcntl(local, fcntl.F_GETFL)
        self._tables[queue.pid, number] = len(self._views)
        stat = os.fstat(local)
        self._views.append(FdView(queue.pid, number, local, link, stat, info, flags, int(info["pos"][0])))
        return len(self._views) - 1

    def lock_lines(self, pid: HostPid, fd: int) -> Sequence[str]:
        return parse_fdinfo(Path(f"/proc/{pid}/fdinfo/{fd}").read_bytes()).get("lock", [])

    def unread(self, view: FdView) -> Sequence[Unread] | None:
        return self._unread.get(self._tables.get((view.pid, view.fd), -1))

    def __exit__(self, *_: object) -> None:
        self.held.close()
        self._stack.close()

    def _take(self, pid: HostPid, pidfd_local: LocalFd, number: int) -> None:
        for index, view in enumerate(self._views):
            if kcmp(pid, view.pid, KCMP.FILE, number, view.fd) == 0:
                self._tables[pid, number] = index
                return
        local = pidfd_getfd(pidfd_local, number)
        self._stack.callback(os.close, local)
        info = parse_fdinfo(Path(f"/proc/{pid}/fdinfo/{number}").read_bytes())
        link = os.readlink(f"/proc/{pid}/fd/{number}".encode())
        flags = fcntl.fcntl(local, fcntl.F_GETFL)
        self._tables[pid, number] = len(self._views)
        self._views.append(
            FdView(pid, number, local, link, os.fstat(local), info, flags, int(info["pos"][0]))
        )

    # -- what kinds ask ---------------------------------------------------------

    def path(self, pid: HostPid, link: bytes) -> PathRef:
        return PathRef(0, link)

    def user(self, uid: int) -> Id:
        return Id(0, uid)

    def group(self, gid: int) -> Id:
        return Id(0, gid)

    def member(self, pid: int) -> int:
        return pid if pid in self.pids else 0

    def files(self) -> Sequence[tuple[int, FdView]]:
        return list(enumerate(self._views))

    def terminals(self, number: int) -> Sequence[tuple[int, FdView]]:
        return pty_sides.by_number(self.files()).get(number, ())

    def file_at(self, pid: HostPid, fd: int) -> int | None:
        return self._tables.get((pid, fd))

    def holders(self, index: int) -> Sequence[tuple[HostPid, int]]:
        return [(HostPid(pid), fd) for (pid, fd), found in self._tables.items() if found == index and fd >= 0]

    def content(self, local: LocalFd, size_bytes: int) -> int:
        space = 100 + len(self.contents)
        self.contents[space] = os.pread(local, size_bytes, 0)
        return space

    def take_along(self, pid: HostPid, link: bytes, local: LocalFd) -> None:
        """Nothing is asked for here: see `tests/test_with_files.py`."""

    def memory(self, view: FdView) -> int:
        for space, known in self.memories.items():
            if known["inode"] == view.stat.st_ino:
                return space
        space = 200 + len(self.memories)
        self.memories[space] = {
            "inode": view.stat.st_ino,
            "name": view.link.removeprefix(b"/memfd:").removesuffix(b" (deleted)"),
            "seals": fcntl.fcntl(view.local, fcntl.F_GET_SEALS),
        }
        reader = os.open(f"/proc/self/fd/{view.local}", os.O_RDONLY)
        self.contents[space] = os.pread(reader, view.stat.st_size, 0)
        os.close(reader)
        return space

    def namespace(self, view: FdView) -> tuple[str, int] | None:
        return None

    def queues_of(self, view: FdView) -> int | None:
        return 3

    def is_external(self, namespace: int) -> bool:
        return True

    def network(self, local: LocalFd) -> int | None:
        return None

    def own_network(self) -> int | None:
        return EXTERNAL_NETWORK

    def in_network(self, netns: int, make: Callable[[], socket.socket]) -> socket.socket:
        return make()

    def look_in_network(self, netns: int, look: Callable[[], bytes]) -> bytes:
        return look()

    def outsiders(self) -> Outsiders:
        found = self._peers.get("outsiders")
        if found is None:
            found = self._peers["outsiders"] = Outsiders()
            found.look()
        return found

    def peers(self) -> dict[Any, Any]:
        return self._peers

    # -- what tests ask ---------------------------------------------------------

    def view(self, fd: int, pid: int | None = None) -> FdView:
        return self._views[self._tables[pid or self.pids[0], fd]]

    def kind(self, fd: int, pid: int | None = None) -> Any:
        return kind_of(self.view(fd, pid))

    def blockers(self, fd: int, pid: int | None = None) -> list[Blocker]:
        """What stops one descriptor."""
        view = self.view(fd, pid)
        return list(kind_of(view).check(view, self))

    def reasons(self, fd: int, pid: int | None = None) -> str:
        """The same as one text."""
        return "\n".join(str(blocker) for blocker in self.blockers(fd, pid))

    def records(self) -> list[OpenFile]:
        """Check and capture everything."""
        found = []
        for index, view in enumerate(self._views):
            kind = kind_of(view)
            assert not list(kind.check(view, self)), view.subject
            state = msgspec.to_builtins(kind.capture(view, self), builtin_types=(bytes,))
            found.append(
                OpenFile(index=index, kind=kind.name, flags=view.flags, position=view.position, state=state)
            )
        return found


def kind_of(view: FdView) -> Any:
    """The kind that carries a view."""
    matching = [kind for kind in KINDS[:-1] if kind.matches(view)]
    assert len(matching) <= 1, [kind.name for kind in matching]
    return matching[0] if matching else KINDS[-1]


class Rebuilt:
    """A `CreateScope` that makes the files of a finished `Capture` again; a context manager.

    After `with`, `fd(number)` is the local copy of the descriptor; `in_puppet` gives the one that the
    puppet of a process has after the last phase.
    """

    #: what the clocks say to the holders of the files; None: they do not go on here
    clock_now: Callable[[int], int | None] = staticmethod(time.clock_gettime_ns)

    def __init__(
        self,
        capture: Capture,
        files: Sequence[OpenFile] | None = None,
        finish: bool = True,
        policy: RestorePolicy | None = None,
        runs: bool = True,
    ) -> None:
        self.policy = policy or RestorePolicy()
        self._runs = runs
        self.late = Late()
        self.notes: list[str] = []
        files = capture.records() if files is None else files
        self.files = msgspec.msgpack.decode(msgspec.msgpack.encode(files), type=list[OpenFile])
        self._numbers = dict(capture._tables)
        self._pids = list(capture.pids)
        self._contents = dict(capture.contents)
        self._memories = dict(capture.memories)
        self._finish = finish
        self._stack = ExitStack()
        self._stack.callback(self.late.close)
        self._scope_stack = ExitStack()
        self._once: dict[tuple[Any, ...], Any] = {}
        self._spaces: dict[int, LocalFd] = {}
        self._locals: dict[int, LocalFd] = {}
        self._puppets: dict[int, Puppet] = {}

    def __enter__(self) -> Self:
        try:
            self._rebuild()
        except BaseException:
            self._scope_stack.close()
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _rebuild(self) -> None:
        kinds = {kind.name: kind for kind in KINDS}
        if self._finish:
            self._puppets = {pid: self._spawn() for pid in self._pids}
        work = [
            (file, kinds[file.kind], msgspec.convert(file.state, kinds[file.kind].record))
            for file in self.files
        ]
        for file, kind, record in work:
            local = kind.create(file, record, self)
            self._stack.callback(os.close, local)
            self._locals[file.index] = local
        for file, kind, record in work:
            kind.connect(file, record, self)
        for file, kind, _ in work:
            if not file.flags & os.O_PATH:
                fcntl.fcntl(self._locals[file.index], fcntl.F_SETFL, file.flags)
            lost = _LOST if kind is unnamed.KIND else os.O_ASYNC  # which a lease sets, in the last phase
            assert fcntl.fcntl(self._locals[file.index], fcntl.F_GETFL) == file.flags & ~lost, file
        if self._finish:
            for (pid, number), index in self._numbers.items():
                if number < 0:
                    continue
                self.send(pid, self._locals[index], number, cloexec=False)
            for file, kind, record in work:
                kind.finish(file, record, self)
            if self._runs:
                self.notes = self.late.run()
        self._scope_stack.close()

    def _spawn(self) -> Puppet:
        puppet = spawn_launcher(_SCRATCH, _CHANNEL)
        self._stack.callback(puppet.stage.channel.close)
        self._stack.callback(puppet.kill_and_reap)
        return puppet

    # -- what kinds ask ---------------------------------------------------------

    def open(self, path: PathRef, flags: int, mode: int = 0) -> LocalFd:
        root = os.open("/", os.O_PATH | os.O_DIRECTORY)
        try:
            return openat2(LocalFd(root), path.path, flags, mode, RESOLVE.IN_ROOT)
        finally:
            os.close(root)

    def user(self, uid: Id) -> int:
        return uid.id

    def group(self, gid: Id) -> int:
        return gid.id

    def in_ipc(self, ipc: int, make: Callable[[], int]) -> LocalFd:
        return LocalFd(make())

    def in_network(self, netns: int, make: Callable[[], Any]) -> Any:
        return make()

    def new_socket(self, netns: int, who: Identity) -> socket.socket:
        made: socket.socket = self.in_network(
            netns, lambda: socket.socket(who.family, who.type, who.protocol)
        )
        return made

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    def own(self, fd: LocalFd) -> LocalFd:
        self._scope_stack.callback(os.close, fd)
        return fd

    def content(self, space: int) -> LocalFd:
        if space not in self._spaces:
            known = self._memories.get(space)
            name = os.fsdecode(known["name"]) if known else "content"
            fd = LocalFd(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
            os.pwrite(fd, self._contents[space], 0)
            self._spaces[space] = self.own(fd)
            if known:
                self._scope_stack.callback(lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, known["seals"]))
        return self._spaces[space]

    def file(self, index: int) -> LocalFd:
        return self._locals[index]

    def holders(self, index: int) -> Sequence[tuple[int, int]]:
        return [(pid, fd) for (pid, fd), found in self._numbers.items() if found == index and fd >= 0]

    def tree_clock_ns(self, index: int, clock: int) -> int | None:
        return self.clock_now(clock)

    def host_pid(self, pid: int) -> HostPid:
        if pid not in self._puppets:
            raise RebuildError(f"no puppet {pid}")
        return self._puppets[pid].pid

    def inject(self, pid: int, number: int, *args: Argument) -> int:
        return self._puppets[pid].syscall(number, *args)

    def inject_all(self, pid: int, calls: Sequence[Call]) -> None:
        self._puppets[pid].run_checked(calls)

    def when_it_runs(self, local: LocalFd, act: Callable[[LocalFd], None], subject: str) -> None:
        self.late.add(local, act, subject)

    def in_thread(self, pid: int, act: Callable[[Inject], T]) -> T:
        thread = self._puppets[pid].clone_task(_THREAD)
        try:
            return act(thread.syscall)
        finally:
            thread.run_to_exit(NR.exit, 0)

    def send(self, pid: int, local: LocalFd, at: int | None = None, cloexec: bool = True) -> int:
        puppet = self._puppets[pid]
        (number,) = puppet.send_fds([local])
        if at is None or number == at:
            return number
        puppet.syscall(NR.dup3, number, at, os.O_CLOEXEC if cloexec else 0)
        puppet.syscall(NR.close, number)
        return at

    # -- what tests ask ---------------------------------------------------------

    def fd(self, number: int, pid: int | None = None) -> LocalFd:
        """The local copy of descriptor `number` of the (first) process."""
        return self._locals[self._numbers[pid or self._pids[0], number]]

    def in_puppet(self, number: int, pid: int | None = None) -> LocalFd:
        """A duplicate of descriptor `number` of a puppet, closed with this."""
        puppet = self._puppets[pid or self._pids[0]]
        holder = pidfd_open(puppet.pid)
        try:
            found = pidfd_getfd(holder, number)
        finally:
            os.close(holder)
        self._stack.callback(os.close, found)
        return found

    def info(self, number: int, pid: int | None = None) -> dict[str, list[str]]:
        """fdinfo of descriptor `number` in the puppet."""
        puppet = self._puppets[pid or self._pids[0]]
        return parse_fdinfo(Path(f"/proc/{puppet.pid}/fdinfo/{number}").read_bytes())
