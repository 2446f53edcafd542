"""What the files of /proc/PID say, typed: pure parsers, and readers that name the file.

The kernel prints; nothing is interpreted here beyond numbers and lists. Ids are as the
*reader* sees them (its user and pid namespace) unless a field says otherwise. A reader
takes the pid of a process or the tid of any thread: /proc/TID exists for both.

A process that is gone is one exception, `ProcessGone`, whether the kernel said ENOENT
(the directory is gone) or ESRCH (it vanished between open and read).

Sources: proc_pid_status(5), proc_pid_stat(5), proc_pid_limits(5), proc_pid_fdinfo(5),
proc_pid_timers(5), proc_tid_children(5); fs/proc/array.c, fs/proc/base.c.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import msgspec

from pipeline.ids import HostPid

_CHUNK_BYTES = 1 << 16
_PF_EXITING = 0x0000_0004
_PF_KTHREAD = 0x0020_0000
RLIM_INFINITY = 0xFFFF_FFFF_FFFF_FFFF


class ProcessGone(ProcessLookupError):
    """The process (or thread) does not exist any more; errno is ESRCH."""

    def __init__(self, pid: int) -> None:
        super().__init__(errno.ESRCH, f"pid {pid} does not exist")
        self.pid = pid


def read_file(pid: HostPid, name: str) -> bytes:
    """The whole of /proc/PID/`name`.

    Raises:
        ProcessGone: there is no such process.
        OSError: EACCES or EPERM: it may not be read; ENOENT: this kernel has no such file.
    """
    from pipeline.kernel.inside import open_file

    try:
        fd = open_file(pid, name, os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _gone_or(error, pid, name) from None
    try:
        chunks = []
        while chunk := os.read(fd, _CHUNK_BYTES):
            chunks.append(chunk)
        return b"".join(chunks)
    except ProcessLookupError:
        raise ProcessGone(pid) from None
    finally:
        os.close(fd)


def read_link(pid: HostPid, name: str) -> bytes:
    """What the magic link /proc/PID/`name` (``exe``, ``cwd``, ``root``, ``fd/3``) prints.

    Raises:
        ProcessGone: there is no such process.
        OSError: ENOENT: the link leads nowhere (the exe of a zombie); EACCES.
    """
    try:
        return os.readlink(f"/proc/{pid}/{name}".encode())
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _gone_or(error, pid, name) from None


def list_dir(pid: HostPid, name: str) -> list[str]:
    """The entries of /proc/PID/`name`; raises as `read_file` does."""
    try:
        return os.listdir(f"/proc/{pid}/{name}")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise _gone_or(error, pid, name) from None


@contextmanager
def unless_gone(pid: HostPid) -> Iterator[None]:
    """Looking at a process that goes on running: what fails because it has ended meanwhile fails in silence.

    One that is ending, or has ended and was not waited for, still has its entry, in which `exe`, `cwd`, `fd` and others
    are missing, or may not be looked at by a plain user: without memory it is nobody's.
    """
    try:
        yield
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        try:
            ending = bool(stat(pid).flags & _PF_EXITING)
        except ProcessGone:
            ending = True
        if not ending:
            raise


def _gone_or(error: OSError, pid: int, name: str) -> OSError:
    """`ProcessGone` if the process (or the thread of it that `name` is of) is, else the error: a file is missing."""
    directory, number, *_ = [*name.split("/"), "", ""]
    task = int(number) if directory == "task" and number else pid
    here = f"/proc/{pid}/stat" if task == pid else f"/proc/{pid}/task/{task}/stat"
    if error.errno == errno.ESRCH or not os.path.exists(here):
        return ProcessGone(task)
    return error


# -- status ---------------------------------------------------------------------------


class Status(msgspec.Struct, frozen=True):
    """/proc/PID/status.

    Ids of `uids`, `gids` (real, effective, saved, filesystem) and `groups` are as the
    reader's user namespace maps them, 65534 where it does not. `ns_*` lists go from the
    reader's pid namespace down to the task's own; `tgid`, `pid`, `ppid`, `tracer_pid`
    are in the reader's, 0 where it cannot see them. Signal sets: bit 0 is signal 1.
    `caps`: inheritable, permitted, effective, bounding, ambient. `umask` is None for a
    zombie. `fields` holds every line by its name.
    """

    name: bytes
    umask: int | None
    state: str
    tgid: HostPid
    pid: HostPid
    ppid: HostPid
    tracer_pid: HostPid
    uids: tuple[int, int, int, int]
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    ns_tgid: tuple[int, ...]
    ns_pid: tuple[int, ...]
    ns_pgid: tuple[int, ...]
    ns_sid: tuple[int, ...]
    threads: int
    pending: int
    shared_pending: int
    blocked: int
    ignored: int
    caught: int
    caps: tuple[int, int, int, int, int]
    no_new_privs: bool
    seccomp: int
    seccomp_filters: int
    thp_enabled: bool | None
    fields: dict[str, bytes]


def _numbers(text: bytes) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


def parse_status(content: bytes) -> Status:
    """Parse /proc/PID/status; ValueError if a field that every kernel since 4.1 has is missing."""
    fields: dict[str, bytes] = {}
    for line in content.split(b"\n"):
        key, colon, value = line.partition(b":")
        if colon:
            fields[key.decode("ascii", "replace")] = value.strip(b" \t") if key != b"Name" else value[1:]
    try:
        own = _numbers(fields["Pid"])
        real, effective, saved, filesystem = _numbers(fields["Uid"])
        rgid, egid, sgid, fsgid = _numbers(fields["Gid"])
        caps = [int(fields[key], 16) for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")]
        return Status(
            name=_unescape_name(fields["Name"]),
            umask=int(fields["Umask"], 8) if "Umask" in fields else None,
            state=fields["State"][:1].decode(),
            tgid=HostPid(int(fields["Tgid"])),
            pid=HostPid(own[0]),
            ppid=HostPid(int(fields["PPid"])),
            tracer_pid=HostPid(int(fields["TracerPid"])),
            uids=(real, effective, saved, filesystem),
            gids=(rgid, egid, sgid, fsgid),
            groups=_numbers(fields["Groups"]),
            ns_tgid=_numbers(fields.get("NStgid", fields["Tgid"])),
            ns_pid=_numbers(fields.get("NSpid", fields["Pid"])),
            ns_pgid=_numbers(fields.get("NSpgid", b"")),
            ns_sid=_numbers(fields.get("NSsid", b"")),
            threads=int(fields["Threads"]),
            pending=int(fields["SigPnd"], 16),
            shared_pending=int(fields["ShdPnd"], 16),
            blocked=int(fields["SigBlk"], 16),
            ignored=int(fields["SigIgn"], 16),
            caught=int(fields["SigCgt"], 16),
            caps=(caps[0], caps[1], caps[2], caps[3], caps[4]),
            no_new_privs=fields.get("NoNewPrivs", b"0") == b"1",
            seccomp=int(fields.get("Seccomp", b"0")),
            seccomp_filters=int(fields.get("Seccomp_filters", b"0")),
            thp_enabled=fields["THP_enabled"] == b"1" if "THP_enabled" in fields else None,
            fields=fields,
        )
    except KeyError as error:
        raise ValueError(f"/proc/PID/status has no line {error}") from None


_NAME_ESCAPE = re.compile(rb"\\(n|\\)")


def _unescape_name(name: bytes) -> bytes:
    return _NAME_ESCAPE.sub(lambda match: b"\n" if match[1] == b"n" else b"\\", name)


def status(pid: HostPid) -> Status:
    """Read /proc/PID/status; `ProcessGone`."""
    return parse_status(read_file(pid, "status"))


# -- stat -----------------------------------------------------------------------------


class Stat(NamedTuple):
    """The 52 fields of /proc/PID/stat, named as in proc_pid_stat(5).

    Addresses (`startcode` ... `env_end`) are 0 or 1 for a reader that may not trace the process.
    """

    pid: int
    comm: bytes
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    tpgid: int
    flags: int
    minflt: int
    cminflt: int
    majflt: int
    cmajflt: int
    utime: int
    stime: int
    cutime: int
    cstime: int
    priority: int
    nice: int
    num_threads: int
    itrealvalue: int
    starttime: int
    vsize: int
    rss: int
    rsslim: int
    startcode: int
    endcode: int
    startstack: int
    kstkesp: int
    kstkeip: int
    signal: int
    blocked: int
    sigignore: int
    sigcatch: int
    wchan: int
    nswap: int
    cnswap: int
    exit_signal: int
    processor: int
    rt_priority: int
    policy: int
    delayacct_blkio_ticks: int
    guest_time: int
    cguest_time: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int
    exit_code: int


def parse_stat(content: bytes) -> Stat:
    """Parse /proc/PID/stat; the name may hold blanks and parentheses: it ends at the *last* one."""
    opening, closing = content.index(b"("), content.rindex(b")")
    rest = content[closing + 1 :].split()
    numbers = [int(value) for value in rest[1:50]]
    return Stat(int(content[:opening]), content[opening + 1 : closing], rest[0].decode(), *numbers)


def stat(pid: HostPid) -> Stat:
    """Read /proc/PID/stat; `ProcessGone`."""
    return parse_stat(read_file(pid, "stat"))


def thread_stat(tid: HostPid) -> Stat:
    """The same of a thread alone; `ProcessGone`. What `stat` tells is added up over all threads, which takes long."""
    return parse_stat(read_file(tid, f"task/{tid}/stat"))


def state(pid: HostPid, tid: HostPid) -> str:
    """The state of a thread of `pid`, a letter of /proc/PID/stat: "R" runs or could run; `ProcessGone`."""
    content = read_file(pid, f"task/{tid}/stat")
    return chr(content[content.rindex(b")") + 2])


def is_exiting(tid: HostPid) -> bool:
    """Whether a task is on its way out or gone: it runs nothing of its program any more (PF_EXITING)."""
    try:
        return bool(thread_stat(tid).flags & _PF_EXITING)
    except ProcessGone:
        return True


def is_kernel_thread(pid: HostPid) -> bool:
    """Whether `pid` is a kernel thread (PF_KTHREAD): it has no memory and no user."""
    return bool(stat(pid).flags & _PF_KTHREAD)


def comm(pid: HostPid) -> str:
    """The name of a task for messages; `Stat.comm` has the exact bytes."""
    return os.fsdecode(read_file(pid, "comm").removesuffix(b"\n"))


# -- limits ---------------------------------------------------------------------------

#: the lines of /proc/PID/limits in the order of the RLIMIT_* numbers 0..15
LIMIT_NAMES: Sequence[bytes] = (
    b"Max cpu time",
    b"Max file size",
    b"Max data size",
    b"Max stack size",
    b"Max core file size",
    b"Max resident set",
    b"Max processes",
    b"Max open files",
    b"Max locked memory",
    b"Max address space",
    b"Max file locks",
    b"Max pending signals",
    b"Max msgqueue size",
    b"Max nice priority",
    b"Max realtime priority",
    b"Max realtime timeout",
)
_LIMIT_NAME_WIDTH = 26


def parse_limits(content: bytes) -> list[tuple[int, int]]:
    """(soft, hard) by RLIMIT_* number; ``unlimited`` is `RLIM_INFINITY`."""
    found: dict[bytes, tuple[int, int]] = {}
    for line in content.splitlines()[1:]:
        soft, hard = (
            RLIM_INFINITY if v == b"unlimited" else int(v) for v in line[_LIMIT_NAME_WIDTH:].split()[:2]
        )
        found[line[:_LIMIT_NAME_WIDTH].rstrip()] = (soft, hard)
    return [found[name] for name in LIMIT_NAMES]


def resident_bytes(pid: HostPid) -> int:
    """The memory of a process that is there, shared and private."""
    return int(read_file(pid, "statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def limits(pid: HostPid) -> list[tuple[int, int]]:
    """Read /proc/PID/limits: (soft, hard) by RLIMIT_* number. Works where prlimit64 is EPERM."""
    return parse_limits(read_file(pid, "limits"))


# -- descriptors ------------------------------------------------------------------------


def parse_fdinfo(content: bytes) -> dict[str, list[str]]:
    """First word of each line without its colon -> the rest; a word that repeats keeps all its lines."""
    found: dict[str, list[str]] = {}
    for line in content.decode("utf-8", "surrogateescape").split("\n"):
        words = line.split(None, 1)
        if words:
            found.setdefault(words[0].removesuffix(":"), []).append(
                words[1].rstrip() if len(words) > 1 else ""
            )
    return found


def fdinfo(pid: HostPid, fd: int) -> dict[str, list[str]]:
    """Read /proc/PID/fdinfo/FD, as `parse_fdinfo` says it.

    Raises:
        ProcessGone: there is no such process.
        FileNotFoundError: there is no such descriptor (any more).
    """
    return parse_fdinfo(read_file(pid, f"fdinfo/{fd}"))


# -- timers -----------------------------------------------------------------------------


class Timer(NamedTuple):
    """A POSIX timer. `notify`: SIGEV_SIGNAL 0, NONE 1, THREAD 2; `thread` is a tid (SIGEV_THREAD_ID) or None.

    The tid is in the reader's pid namespace.
    """

    id: int
    signal: int
    sigval: int
    notify: int
    thread: int | None
    clock: int


_TIMER = re.compile(
    rb"ID: (-?\d+)\nsignal: (\d+)/([0-9a-f]+)\n"
    rb"notify: (signal|none|thread)/(pid|tid)\.(-?\d+)\nClockID: (-?\d+)"
)
_NOTIFY = {b"signal": 0, b"none": 1, b"thread": 2}


def parse_timers(content: bytes) -> list[Timer]:
    """Parse /proc/PID/timers; ValueError if the kernel printed something else."""
    found = [
        Timer(
            int(m[1]),
            int(m[2]),
            int(m[3], 16),
            _NOTIFY[m[4]],
            int(m[6]) if m[5] == b"tid" else None,
            int(m[7]),
        )
        for m in _TIMER.finditer(content)
    ]
    if len(found) != content.count(b"ID: ") - content.count(b"ClockID: "):
        raise ValueError("/proc/PID/timers has an unknown form")
    return found


def timers(pid: HostPid) -> list[Timer]:
    """Read /proc/PID/timers; ENOENT where the kernel lacks CONFIG_CHECKPOINT_RESTORE."""
    return parse_timers(read_file(pid, "timers"))


# -- small ones ---------------------------------------------------------------------------


def tasks(pid: HostPid) -> list[HostPid]:
    """The threads of process `pid`, ascending."""
    while True:
        try:
            return sorted(HostPid(int(name)) for name in list_dir(pid, "task"))
        except FileNotFoundError:
            continue  # a thread has executed a program, and taken over the number of the first one just now


def children(pid: HostPid) -> list[HostPid]:
    """The children of process `pid`, whichever of its threads made them, zombies too.

    Exact only while `pid` is stopped (proc_tid_children(5)).
    """
    found: list[HostPid] = []
    for tid in tasks(pid):
        try:
            content = read_file(pid, f"task/{tid}/children")
        except (FileNotFoundError, ProcessGone):
            continue  # the thread has ended; its children are another thread's now
        found.extend(HostPid(int(word)) for word in content.split())
    return found


def cmdline(pid: HostPid) -> list[bytes]:
    """The argument vector; empty for zombies and kernel threads."""
    content = read_file(pid, "cmdline")
    return content.removesuffix(b"\0").split(b"\0") if content else []


def environ(pid: HostPid) -> bytes:
    """The initial environment, as the kernel gives it: NUL-terminated strings."""
    return read_file(pid, "environ")


def auxv(pid: HostPid) -> bytes:
    """The auxiliary vector up to and with AT_NULL, 16 bytes an entry."""
    content = read_file(pid, "auxv")
    for offset in range(0, len(content) - 15, 16):
        if struct.unpack_from("<Q", content, offset)[0] == 0:
            return content[: offset + 16]
    return content


def coredump_filter(pid: HostPid) -> int:
    """Bits of /proc/PID/coredump_filter (core(5)); 0 for a zombie."""
    return int(read_file(pid, "coredump_filter") or b"0", 16)
