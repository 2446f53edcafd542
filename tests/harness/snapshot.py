"""What /proc says of a tree, field by field, and which differences a restore may make.

`take` reads every process and thread of a family (host pids) into plain dictionaries;
`compare` lists what is different. Everything is compared but what stands in the tables
here, each entry with its reason. Namespaces and open files are compared by topology: who
shares what with whom, because their numbers are the kernel's.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel.pagemap import PAGE_BYTES, Range, entries_of, intersect, merged, open_pagemap, populated
from pipeline.kernel.procfs import ProcessGone

#: fields of /proc/PID/status that may differ, with the reason
STATUS_MAY_DIFFER = {
    "State": "a running process is in another state at each look; stopped and dead ones are compared by `state`",
    "FDSize": "the capacity of the descriptor table, not its content",
    "VmPeak": "history",
    "VmHWM": "history",
    "VmRSS": "pages of files come back when they are touched; anonymous memory is compared by mapping",
    "RssAnon": "see VmRSS",
    "RssFile": "see VmRSS",
    "RssShmem": "see VmRSS",
    "HugetlbPages": "what of shared memory the process itself has touched",
    "VmPTE": "page tables follow the pages",
    "VmSwap": "what the kernel swaps out is its business",
    "SigQ": "counts the signals of all processes of the user",
    "TracerPid": "checked to be 0",
    "voluntary_ctxt_switches": "history",
    "nonvoluntary_ctxt_switches": "history",
    "Speculation_Store_Bypass": "the same words, with the restorer's own prctl state left to the kernel",
    "SpeculationIndirectBranch": "see Speculation_Store_Bypass",
    "Mems_allowed": "of the machine",
    "Mems_allowed_list": "of the machine",
    "Cpus_allowed": "compared as sched_getaffinity, and by the programs",
    "Ngid": "NUMA balancing group",
    "CoreDumping": "never during a test",
}
#: fields of a zombie that may differ: it has no use for any of them, and only its ids, status and place are looked at
ZOMBIE_MAY_DIFFER = re.compile(
    r"^(limits|status\.(Sig|Shd|Cap|NoNewPrivs|Seccomp|Groups|Umask).*|stat\.(nice|priority|policy|rt_priority)|affinity"
    r"|oom_score_adj|timerslack_ns|personality|ns .*)$"
)
#: positions in /proc/PID/stat after the command, from the state on, that must last; all others are history or counters
STAT_MUST_LAST = {
    "ppid": 1, "pgrp": 2, "session": 3, "tty_nr": 4, "tpgid": 5, "priority": 15, "nice": 16, "num_threads": 17,
    "vsize": 20, "startcode": 23, "endcode": 24, "startstack": 25, "exit_signal": 35, "rt_priority": 37, "policy": 38,
    "start_data": 42, "end_data": 43, "start_brk": 44, "arg_start": 45, "arg_end": 46, "env_start": 47, "env_end": 48,
    "exit_code": 49,
}  # fmt: skip
#: lines of /proc/PID/fdinfo that may differ
FDINFO_MAY_DIFFER = {
    "ino": "inode numbers of anonymous files and of deleted files are the kernel's",
    "mnt_id": "mount ids are the kernel's",
    "ticks": "a running timer",
    "it_value": "a running timer: the programs check what is left",
    "eventfd-id": "a number of the kernel",
}
# O_TMPFILE may go: it says how an unnamed file once came to be; it is opened again from another
#: flags of files without a name: O_TMPFILE (with its O_DIRECTORY), O_NOFOLLOW and O_LARGEFILE say how they were opened
UNNAMED_MAY_DIFFER = os.O_TMPFILE | os.O_NOFOLLOW | 0o100000
#: namespaces of a process
KINDS = ("user", "pid", "pid_for_children", "mnt", "uts", "ipc", "net", "cgroup", "time", "time_for_children")
#: plain files of /proc/PID that must be equal as they are
FILES = (
    "comm", "cmdline", "environ", "auxv", "limits", "uid_map", "gid_map", "setgroups", "oom_score_adj", "personality",
    "coredump_filter", "timerslack_ns", "loginuid",
)  # fmt: skip
#: VmFlags that may differ: "sd" (soft-dirty), "ac" (accounted: was writable and private once) and "gu" (may have
#: guards: had a neighbour with guards once; the programs look at the guards) are the history of a mapping; mappings
#: that differ in nothing else may be one mapping afterwards
VMFLAGS_MAY_DIFFER = {"sd", "ac", "gu"}
#: a running program and the frames that a dump leaves below the stack pointer touch a few pages
ANONYMOUS_SLACK_KIB = 256
#: of entries of pagemap, the most significant byte of those that are present
_PRESENT = re.compile(b"[\x80-\xff]+")
_ZERO_PAGE = bytes(4096)
_BLOCK_BYTES = 1 << 20

NS_GET_USERNS, NS_GET_PARENT, NS_GET_OWNER_UID = 0xB701, 0xB702, 0xB704
SYS_KCMP, KCMP_FILE, KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND, KCMP_IO = 312, 0, 1, 2, 3, 4, 5
_libc = ctypes.CDLL(None, use_errno=True)


class Namespaces:
    """Names for namespaces that do not depend on the kernel's numbers.

    A namespace the looker is in itself is ``host``; others are numbered in the order in which
    they are met. `facts` has for each its owner, its parent and its owner's uid.
    """

    def __init__(self) -> None:
        self._names: dict[tuple[int, int], str] = {}
        self._counts: Counter[str] = Counter()
        self.facts: dict[str, list[str]] = {}
        for kind in KINDS:
            found = os.stat(f"/proc/self/ns/{kind}")
            self._names[found.st_dev, found.st_ino] = "host"

    def name(self, fd: int, kind: str) -> str:
        """The name of the open namespace file `fd`."""
        found = os.fstat(fd)
        key = found.st_dev, found.st_ino
        if key not in self._names:
            plain = kind.removesuffix("_for_children")
            self._counts[plain] += 1
            name = self._names[key] = f"{plain}{self._counts[plain]}"
            facts = [f"owner {self._follow(fd, NS_GET_USERNS, 'user')}"]
            if name.startswith(("user", "pid")):
                facts.append(f"parent {self._follow(fd, NS_GET_PARENT, kind)}")
            if name.startswith("user"):
                uid = fcntl.ioctl(fd, NS_GET_OWNER_UID, bytes(4))
                facts.append(f"uid {int.from_bytes(uid, 'little')}")
            self.facts[name] = facts
        return self._names[key]

    def _follow(self, fd: int, request: int, kind: str) -> str:
        try:
            other = fcntl.ioctl(fd, request)
        except PermissionError:
            return "outside"
        try:
            return self.name(other, kind)
        finally:
            os.close(other)


def kcmp(pid_a: int, pid_b: int, kind: int, a: int = 0, b: int = 0) -> int:
    """kcmp(2): 0 if the two share the object, 1, 2 or 3 if not."""
    result = int(_libc.syscall(SYS_KCMP, pid_a, pid_b, kind, ctypes.c_ulong(a), ctypes.c_ulong(b)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _is_same_file(pid_a: int, fd_a: int, pid_b: int, fd_b: int) -> bool:
    try:
        return kcmp(pid_a, pid_b, KCMP_FILE, fd_a, fd_b) == 0
    except OSError as error:
        if error.errno == errno.EBADF:  # closed since it was listed
            return False
        raise


def _read(path: str) -> str | None:
    """A file of /proc; None where the kernel says that there is none (a zombie has no memory)."""
    try:
        return Path(path).read_bytes().decode("latin-1")
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ESRCH, errno.ENOENT}:
            return None
        return f"<{errno.errorcode[error.errno or 0]}>"


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _status(pid: int, thread: int) -> dict[str, str]:
    fields = {}
    for line in (_read(f"/proc/{pid}/task/{thread}/status") or "").splitlines():
        name, _, value = line.partition(":")
        if name not in STATUS_MAY_DIFFER:
            fields[f"status.{name}"] = value.strip()
        elif name == "TracerPid":
            fields["status.TracerPid"] = value.strip()
    return fields


def _stat(pid: int, thread: int) -> dict[str, str]:
    text = _read(f"/proc/{pid}/task/{thread}/stat")
    if text is None:
        return {}
    values = text.rpartition(")")[2].split()
    found = {f"stat.{name}": values[place] for name, place in STAT_MUST_LAST.items()}
    found["state"] = values[0] if values[0] in "TtZ" else "alive"
    return found


def _maps(pid: int) -> tuple[list[str], dict[str, list[int]]]:
    """Each mapping with its protection, offset, name and flags; and those that have memory of their own.

    Of these: how much, in KiB, and how much of it is zero.
    """
    found: list[list[Any]] = []
    for line in (_read(f"/proc/{pid}/smaps") or "").splitlines():
        head = line.split(None, 5)
        if not head[0].endswith(":"):
            start, end = (int(part, 16) for part in head[0].split("-"))
            name = _without_number(head[5]) if len(head) > 5 else ""
            found.append([start, end, head[1], int(head[2], 16), name, "", 0, 0])
        elif head[0] == "VmFlags:":
            found[-1][5] = " ".join(flag for flag in line.split()[1:] if flag not in VMFLAGS_MAY_DIFFER)
        elif found[-1][4] == "[vdso]":
            continue  # who is asked something keeps a copy of its last page, and a restored one has none
        elif head[0] in {"Anonymous:", "Swap:"} and found[-1][2][3] == "p":
            found[-1][6] += int(head[1])
    _count_zeros(pid, [entry for entry in found if entry[6]])
    joined: list[list[Any]] = []
    for entry in found:
        last = joined[-1] if joined else None
        follows = (
            last is not None and last[1] == entry[0] and [last[2], *last[4:6]] == [entry[2], *entry[4:6]]
        )
        if (
            last is not None
            and follows
            and (entry[4][:1] in {"", "["} or entry[3] == last[3] + entry[0] - last[0])
        ):
            last[1] = entry[1]
            last[6:] = last[6] + entry[6], last[7] + entry[7]
        else:
            joined.append(entry)
    lines = [
        f"{start:x}-{end:x} {mode} {offset:x} {name} [{flags}]"
        for start, end, mode, offset, name, flags, *_ in joined
    ]
    return lines, {f"{start:x}-{end:x}": [kib, zero] for start, end, *_, kib, zero in joined if kib}


def _count_zeros(pid: int, mappings: list[list[Any]]) -> None:
    """Say in the last field of each mapping how much of what it has of its own is zero, in KiB."""
    try:
        pagemap = open_pagemap(HostPid(pid))
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (ProcessGone, OSError):  # it has ended meanwhile
        return
    try:
        for mapping in mappings:
            for start, end in _present_pages(pagemap, mapping[0], mapping[1]):
                for address in range(start, end, _BLOCK_BYTES):
                    content = os.pread(memory, min(end - address, _BLOCK_BYTES), address)
                    pages = range(0, len(content), len(_ZERO_PAGE))
                    zero = [at for at in pages if not content[at] and content.startswith(_ZERO_PAGE, at)]
                    mapping[7] += len(zero) * len(_ZERO_PAGE) // 1024
    finally:
        os.close(pagemap)
        os.close(memory)


def _present_pages(pagemap: LocalFd, start: int, end: int) -> list[Range]:
    """Pages of its own; not where a userfaultfd has left a mark and no page: to read it would make one."""
    present = [
        (address + match.start() * PAGE_BYTES, address + match.end() * PAGE_BYTES)
        for address, entries in entries_of(pagemap, start, end)
        for match in _PRESENT.finditer(entries[7::8])
    ]
    return intersect(populated(pagemap, [(start, end)]).pages, merged(present))


def _directory(path: str) -> str | None:
    """Where a link to a directory leads; without the number of a process that has ended, if it is that one's."""
    name = _link(path)
    try:
        os.scandir(path).close()
    except (ProcessLookupError, FileNotFoundError):
        return name and re.sub(r"^/proc/\d+", "/proc/ended", name)
    return name


def _without_number(name: str) -> str:
    """A name without what the kernel or the restore chose: `socket:[123]`, `/where/it/was (deleted)`.

    A deleted file has no name any more; its content is made again where the restorer has room.
    """
    if name.endswith(" (deleted)") and not name.startswith(("/memfd:", "/dev/zero")):
        return "(deleted)"
    return re.sub(r"^(socket|pipe|net|user|mnt|pid|uts|ipc|cgroup|time):\[\d+\]$", r"\1:", name)


def _open_files(pid: int) -> dict[int, str]:
    """Open descriptors and what they lead to.

    Without those that a running program opens for a moment: the harness's requests, and files of /proc.
    """
    found: dict[int, str] = {}
    try:
        numbers = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
    except OSError:
        return found
    for fd in numbers:
        link = _link(f"/proc/{pid}/fd/{fd}")
        if link is not None and not link.startswith("/proc/") and "/request." not in link:
            found[fd] = link
    return found


def _descriptors(pid: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for fd, link in _open_files(pid).items():
        lines = []
        for line in (_read(f"/proc/{pid}/fdinfo/{fd}") or "").splitlines():
            name, _, value = line.partition(":")
            if name == "tfd":  # an epoll entry ends with the position, inode and device of what it watches
                lines.append(" ".join(line.split()[:6]))
            elif name == "inotify wd":  # not which inode: deleted files and those of /proc are others
                lines.append(" ".join([line.split()[1], line.split()[4]]))
            elif name == "flags" and link.endswith(" (deleted)"):
                lines.append(f"flags:{int(value, 8) & ~UNNAMED_MAY_DIFFER:o}")
            elif name == "flags":
                flags = int(value, 8)
                unnamed = flags & os.O_TMPFILE == os.O_TMPFILE
                lines.append(f"flags:{flags & ~os.O_TMPFILE if unnamed else flags:o}")
            elif name == "pos" and link == "/dev/net/tun":
                continue  # how much was read once; it means nothing, and cannot be set
            elif (
                name == "lock" and " LEASE " in value
            ):  # who took it: a number for people, which only lslocks shows
                words = value.split()
                lines.append(" ".join(["lock", *words[:4], *words[5:]]))
            elif name not in FDINFO_MAY_DIFFER:
                lines.append(f"{name}:{' '.join(value.split())}")
        found[f"fd {fd}"] = [_without_number(link), *sorted(lines)]
    return found


def _sharing(pids: list[int]) -> dict[str, Any]:
    """Which descriptors are the same open file, and which processes share memory, tables and the rest."""
    facts: dict[str, Any] = {}
    groups: list[tuple[int, int, list[str]]] = []
    for pid in pids:
        for fd in _open_files(pid):
            for other, number, members in groups:
                if _is_same_file(pid, fd, other, number):
                    members.append(f"{pid}:{fd}")
                    break
            else:
                groups.append((pid, fd, [f"{pid}:{fd}"]))
    facts["open files shared"] = sorted(members for *_, members in groups if len(members) > 1)
    alive = [pid for pid in pids if _link(f"/proc/{pid}/exe")]
    kinds = {"memory": KCMP_VM, "descriptor table": KCMP_FILES, "fs": KCMP_FS, "handlers": KCMP_SIGHAND}
    for name, kind in kinds.items():
        facts[f"{name} shared"] = [
            (a, b) for i, a in enumerate(alive) for b in alive[i + 1 :] if kcmp(a, b, kind) == 0
        ]
    return facts


def _pipes(pids: list[int]) -> list[list[str]]:
    """Descriptors of the same pipe or socket inode: both ends of one pipe have one inode."""
    found: dict[str, list[str]] = {}
    for pid in pids:
        for fd, link in _open_files(pid).items():
            if link.startswith("pipe:"):
                found.setdefault(link, []).append(f"{pid}:{fd}")
    return sorted(found.values())


def _mounts(pid: int) -> list[str] | None:
    text = _read(f"/proc/{pid}/mountinfo")
    if text is None:
        return None
    lines = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split()
        # ids, device numbers of virtual filesystems and peer groups are the kernel's
        kinds = [re.sub(r":\d+", "", field) for field in fields[6:]]
        if tail.startswith("nsfs "):  # the program knows which namespace it is
            fields[3] = re.sub(r"\d+", "", fields[3])
        lines.append(" ".join([*fields[3:6], *kinds, tail]))
    return lines


def take(pids: Iterable[int]) -> dict[str, Any]:
    """Everything that is compared, of the processes `pids` (host pids) of one family."""
    family = sorted(pids)
    namespaces = Namespaces()
    snapshot: dict[str, Any] = {"processes": family}
    for pid in family:
        for name in FILES:
            snapshot[f"{pid} {name}"] = _read(f"/proc/{pid}/{name}")
        snapshot[f"{pid} timers"] = _timers(pid)
        for name in ("cwd", "root"):
            snapshot[f"{pid} {name}"] = _directory(f"/proc/{pid}/{name}")
        snapshot[f"{pid} exe"] = _link(f"/proc/{pid}/exe")
        snapshot[f"{pid} maps"], snapshot[f"{pid} own pages"] = _maps(pid)
        snapshot[f"{pid} mounts"] = _mounts(pid)
        for name, value in _descriptors(pid).items():
            snapshot[f"{pid} {name}"] = value
        for kind in KINDS:
            snapshot[f"{pid} ns {kind}"] = _namespace(namespaces, pid, kind)
        for thread in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
            label = f"{pid}" if thread == pid else f"{pid} thread {thread}"
            for name, value in {**_status(pid, thread), **_stat(pid, thread)}.items():
                snapshot[f"{label} {name}"] = value
            snapshot[f"{label} comm"] = _read(f"/proc/{pid}/task/{thread}/comm")
            try:
                snapshot[f"{label} affinity"] = sorted(os.sched_getaffinity(thread))
            except OSError:
                snapshot[f"{label} affinity"] = None
        if snapshot[f"{pid} state"] == "Z":
            for key in [key for key in snapshot if key.startswith(f"{pid} ")]:
                if ZOMBIE_MAY_DIFFER.match(key.split(" ", 1)[1]):
                    del snapshot[key]
    snapshot["namespaces"] = namespaces.facts
    snapshot["pipes"] = _pipes(family)
    snapshot.update(_sharing(family))
    return snapshot


def _timers(pid: int) -> list[str]:
    """POSIX timers without the time that is left; the kernel lists them newest first, an order that may differ."""
    return sorted((_read(f"/proc/{pid}/timers") or "").split("ID: "))


def _namespace(namespaces: Namespaces, pid: int, kind: str) -> str | None:
    try:
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return namespaces.name(fd, kind)
    finally:
        os.close(fd)


def _task(key: str) -> str:
    """The process or thread that an entry is about: `12` or `12 thread 13`."""
    words = key.split(" ")
    return " ".join(words[:3]) if words[1] == "thread" else words[0]


def _tasks(snapshot: dict[str, Any]) -> set[str]:
    return {_task(key) for key in snapshot if key[0].isdigit()}


def _stacks(mounts: list[Any]) -> dict[str, list[Any]]:
    """Mounts by their place. What lies on what matters; the order of places is that in which a copy was made."""
    found: dict[str, list[Any]] = {}
    for mount in mounts:
        found.setdefault(str(mount).split()[1], []).append(mount)
    return found


def _own_pages(old: dict[str, list[int]], new: dict[str, list[int]]) -> Iterator[str]:
    """What is more than a running program takes, and what is less but for pages that are zero, which take no memory."""
    for name, (kib, zero_kib) in old.items():
        now_kib = new.get(name, [0])[0]
        if now_kib < kib - zero_kib:
            yield f"{name} had {kib} KiB, {zero_kib} of it zero, and has {now_kib}"
    before, after = (sum(kib for kib, _ in found.values()) for found in (old, new))
    if after > before + ANONYMOUS_SLACK_KIB:
        yield f"{before} KiB have become {after}"


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each difference; lists are compared entry by entry."""
    lines: list[str] = []
    for verb, some, others in (("gone", before, after), ("came", after, before)):
        lines += [f"{verb}: {task}" for task in sorted(_tasks(some) - _tasks(others))]
    both = _tasks(before) & _tasks(after)
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if old == new or (key[0].isdigit() and _task(key) not in both):
            continue
        if key.endswith(" own pages") and old is not None and new is not None:
            lines += [f"{key}: {line}" for line in _own_pages(old, new)]
            continue
        if isinstance(old, list) and isinstance(new, list):
            lines += [f"{key}: gone: {item}" for item in old if item not in new]
            lines += [f"{key}: came: {item}" for item in new if item not in old]
            same = sorted(map(repr, old)) == sorted(map(repr, new))
            if same and not (key.endswith(" mounts") and _stacks(old) == _stacks(new)):
                lines.append(f"{key}: another order")
        else:
            lines.append(f"{key}: was {old!r}, is {new!r}")
    return lines


if __name__ == "__main__":
    from tests.harness.tree import family_of

    print(json.dumps(take(family_of(int(sys.argv[1])))))
