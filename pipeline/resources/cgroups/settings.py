"""What can be set in a cgroup: one table for both versions, and how each is read and written.

A setting that has its default is not recorded. Whatever the kernel lets be written is in the table or in
`NOT_KEPT`, with the reason there.

Numbers of block devices are the host's: in a record a line of a device begins with its name, and is only set where a
device of that name is.

Sources: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/ of the kernel.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator, Mapping

_NO_LIMIT = b"9223372036854771712"

#: name -> the default; None: inherited from above, or the kernel's choice, so always recorded
DEFAULTS: Mapping[str, bytes | None] = {
    # version 2
    "cgroup.max.depth": b"max",
    "cgroup.max.descendants": b"max",
    "cgroup.pressure": b"1",
    "cpu.weight": b"100",
    "cpu.max": b"max 100000",
    "cpu.max.burst": b"0",
    "cpu.uclamp.min": b"0.00",
    "cpu.uclamp.max": b"max",
    "cpu.idle": b"0",
    "memory.min": b"0",
    "memory.low": b"0",
    "memory.high": b"max",
    "memory.max": b"max",
    "memory.swap.high": b"max",
    "memory.swap.max": b"max",
    "memory.zswap.max": b"max",
    "memory.zswap.writeback": b"1",
    "memory.oom.group": b"0",
    "io.weight": b"default 100",
    "io.bfq.weight": b"default 100",
    "io.max": b"",
    "io.latency": b"",
    "io.prio.class": b"no-change",
    "pids.max": b"max",
    "misc.max": b"",
    "rdma.max": b"",
    "cpuset.cpus.exclusive": b"",
    "cpuset.cpus.partition": b"member",
    # both versions
    "cpuset.cpus": None,
    "cpuset.mems": None,
    # version 1
    "cgroup.clone_children": b"0",
    "notify_on_release": b"0",
    "cpu.shares": b"1024",
    "cpu.cfs_period_us": b"100000",
    "cpu.cfs_quota_us": b"-1",
    "cpu.cfs_burst_us": b"0",
    "cpu.rt_period_us": b"1000000",
    "cpu.rt_runtime_us": b"0",
    "cpuset.cpu_exclusive": b"0",
    "cpuset.mem_exclusive": b"0",
    "cpuset.mem_hardwall": b"0",
    "cpuset.memory_migrate": b"0",
    "cpuset.memory_spread_page": b"0",
    "cpuset.memory_spread_slab": b"0",
    "cpuset.sched_load_balance": b"1",
    "cpuset.sched_relax_domain_level": b"-1",
    "memory.limit_in_bytes": _NO_LIMIT,
    "memory.memsw.limit_in_bytes": _NO_LIMIT,
    "memory.soft_limit_in_bytes": _NO_LIMIT,
    "memory.kmem.tcp.limit_in_bytes": _NO_LIMIT,
    "memory.swappiness": None,
    "memory.oom_control": b"0",
    "devices.list": None,
    "blkio.bfq.weight": b"100",
    "blkio.bfq.weight_device": b"",
    "blkio.throttle.read_bps_device": b"",
    "blkio.throttle.read_iops_device": b"",
    "blkio.throttle.write_bps_device": b"",
    "blkio.throttle.write_iops_device": b"",
    "net_cls.classid": b"0",
}
#: by their form: of every size of huge pages
_PATTERNS = (
    (re.compile(r"hugetlb\.\w+\.(rsvd\.)?max"), b"max"),
    (re.compile(r"hugetlb\.\w+\.(rsvd\.)?limit_in_bytes"), None),
)
#: what can be written and is not a setting that is kept
NOT_KEPT: Mapping[str, str] = {
    "cgroup.procs": "members",
    "cgroup.threads": "members",
    "tasks": "members",
    "cgroup.type": "made by the order of things",
    "cgroup.subtree_control": "set when the cgroup is opened for those below",
    "cgroup.freeze": "a frozen cgroup is refused",
    "freezer.state": "a frozen cgroup is refused",
    "cgroup.kill": "an act",
    "cgroup.event_control": "an act",
    "memory.reclaim": "an act",
    "memory.force_empty": "an act",
    "memory.peak": "a reading that can be set to zero",
    "memory.swap.peak": "a reading that can be set to zero",
    "memory.failcnt": "a reading that can be set to zero",
    "memory.max_usage_in_bytes": "a reading that can be set to zero",
    "memory.memsw.failcnt": "a reading that can be set to zero",
    "memory.memsw.max_usage_in_bytes": "a reading that can be set to zero",
    "memory.kmem.failcnt": "a reading that can be set to zero",
    "memory.kmem.max_usage_in_bytes": "a reading that can be set to zero",
    "memory.kmem.tcp.failcnt": "a reading that can be set to zero",
    "memory.kmem.tcp.max_usage_in_bytes": "a reading that can be set to zero",
    "memory.kmem.limit_in_bytes": "has no effect any more",
    "memory.use_hierarchy": "always 1",
    "memory.move_charge_at_immigrate": "has no effect any more",
    "memory.pressure_level": "a place to ask for events",
    "memory.pressure": "a place to ask for events",
    "cpu.pressure": "a place to ask for events",
    "io.pressure": "a place to ask for events",
    "irq.pressure": "a place to ask for events",
    "cpu.weight.nice": "another form of cpu.weight",
    "cpuacct.usage": "a reading that can be set to zero",
    "blkio.reset_stats": "an act",
    "cpuset.memory_pressure_enabled": "of the whole machine",
    "net_prio.ifpriomap": "of devices of the host",
    "devices.allow": "see devices.list",
    "devices.deny": "see devices.list",
}
_OF_DEVICES = frozenset(
    {"io.max", "io.latency", "io.weight", "io.bfq.weight"} | {n for n in DEFAULTS if n.endswith("_device")}
)
#: without these nobody can be in a new cgroup of version 1
CPUSET = ("cpuset.cpus", "cpuset.mems")
#: must be set before anybody is in the cgroup, or a cgroup is below it
EARLY = frozenset({*CPUSET, "devices.list"})
#: the classes of extended attributes that a cgroup keeps; those of security modules are the host's
KEPT_XATTRS = ("user.", "trusted.")
_NUMBER = re.compile(rb"(\d+):(\d+)( .*)?")
_NAME = re.compile(rb"([a-zA-Z][\w!.-]{0,63})( .*)?")


class UnknownDeviceError(Exception):
    """There is no block device of this name here."""


def default_of(name: str) -> tuple[bool, bytes | None]:
    """Whether a file is a setting, and its default."""
    if name in DEFAULTS:
        return True, DEFAULTS[name]
    for pattern, default in _PATTERNS:
        if pattern.fullmatch(name):
            return True, default
    return False, None


def _get(directory: bytes, name: str) -> bytes | None:
    """The text of a setting; None where it is not there or cannot be read."""
    try:
        with open(os.path.join(directory, os.fsencode(name)), "rb") as file:
            text = file.read().strip()
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.EOPNOTSUPP, errno.EACCES, errno.EINVAL}:
            return None
        raise
    if name == "memory.oom_control":
        return next(
            (line.split()[1] for line in text.splitlines() if line.startswith(b"oom_kill_disable")), None
        )
    return text


def current(directory: bytes) -> dict[str, bytes]:
    """Every setting of a cgroup as it is now."""
    found: dict[str, bytes] = {}
    for name in sorted(os.listdir(directory)):
        text = os.fsdecode(name)
        if default_of(text)[0]:
            value = _get(directory, text)
            if value is not None:
                found[text] = value
    return found


def to_record(values: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those that are not the default, with names of devices instead of their numbers."""
    kept = {name: value for name, value in values.items() if value != default_of(name)[1]}
    return {name: _lines(value, _to_name) if name in _OF_DEVICES else value for name, value in kept.items()}


def changes(record: Mapping[str, bytes], now: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """What has to be written so that a cgroup gets the settings of a record.

    Args:
        record: of `to_record`.
        now: of `current`, in the cgroup that is to have them.

    Raises:
        UnknownDeviceError: a device that is not here.
    """
    idle = record.get("cpu.idle", b"0") != b"0"
    for name in (*DEFAULTS, *(n for n in now if n not in DEFAULTS)):
        if name not in now or (idle and name in {"cpu.weight", "cpu.shares"}):
            continue
        wanted = record.get(name, default_of(name)[1])
        if wanted is None:
            continue
        if name in _OF_DEVICES:
            wanted = _lines(wanted, _to_number)
        if wanted != now[name]:
            yield name, wanted


def write(directory: bytes, name: str, value: bytes) -> None:
    """Set one. Raises OSError: the kernel refuses it."""
    if name == "devices.list":
        _put(directory, "devices.deny", b"a")
        for line in value.splitlines():
            _put(directory, "devices.allow", line)
        return
    for line in value.splitlines() or [b""]:
        _put(directory, name, line)


def _put(directory: bytes, name: str, value: bytes) -> None:
    fd = os.open(os.path.join(directory, os.fsencode(name)), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value or b"\n")
    finally:
        os.close(fd)


def _lines(text: bytes, change: Callable[[bytes], bytes]) -> bytes:
    return b"\n".join(change(line) for line in text.splitlines())


def _to_name(line: bytes) -> bytes:
    found = _NUMBER.fullmatch(line)
    if found is None:
        return line
    try:
        name = os.path.basename(os.readlink(b"/sys/dev/block/%s:%s" % (found[1], found[2])))
    except OSError:
        return line
    return name + (found[3] or b"")


def _to_number(line: bytes) -> bytes:
    found = _NAME.fullmatch(line)
    if found is None or found[1] == b"default":
        return line
    try:
        with open(b"/sys/class/block/" + found[1] + b"/dev", "rb") as file:
            return file.read().strip() + (found[2] or b"")
    except OSError:
        raise UnknownDeviceError(f"there is no block device {found[1].decode()} here") from None
