"""Ids and capabilities of a task: read from /proc, and given back to a puppet.

A puppet has all capabilities in the user namespace it is in. The order:

1. *before* it joins its final user namespace: supplementary groups, and those of its
   ids that have no number in the final namespace (a task that entered before the map
   was written). They are set from the outside, or they cannot be set at all.
2. *after*: securebits that keep capabilities while ids change, then setresgid and
   setresuid straight to the final values (never by way of 0, which the map may lack),
   filesystem ids, capability sets, ambient ones, securebits, the bounding set, and
   the capability sets once more as they shall stay.

Sources: capabilities(7), setresuid(2), user_namespaces(7).
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator, Sequence

from pipeline.errors import RebuildError
from pipeline.image.schema import Credentials, Id, Thread
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR, call_name
from pipeline.kernel.syscalls import PRCTL
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support
from pipeline.userns.forest import OVERFLOW_ID

_NO_ID = 0xFFFF_FFFF
_KEEP_CAPS = 1 << 4
_NO_SETUID_FIXUP = 1 << 2
_AMBIENT_RAISE = 2
_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522


SUPPORT = Support(
    kind="credentials",
    carried=(
        "real, effective, saved and file system ids, supplementary groups, per thread; ids without a mapping",
        "all five capability sets, securebits, no_new_privs",
    ),
    refused=("at the destination: ids that have no place there, groups that setgroups is denied for",),
    shown_by=("programs/credentials.py", "programs/identity.py", "resources/test_tasks_state.py"),
)

#: what an `Id` is called in a user namespace of the image; None where it has no mapping
Number = Callable[[Id, int], int | None]


def captured(status: procfs.Status, userns: int, securebits: int) -> Credentials:
    """All ids and capabilities of a task; ids as the pipeline sees them (`Id(0, …)`).

    Args:
        status: of the task.
        userns: the `UserNamespace` index it is in.
        securebits: PR_GET_SECUREBITS, as the task itself says.
    """
    inheritable, permitted, effective, bounding, ambient = status.caps
    return Credentials(
        userns=userns,
        uids=[Id(0, uid) for uid in status.uids],
        gids=[Id(0, gid) for gid in status.gids],
        groups=[Id(0, gid) for gid in status.groups],
        caps=[inheritable, permitted, effective, bounding, ambient],
        securebits=securebits,
        no_new_privs=status.no_new_privs,
    )


def capset(effective: int, permitted: int, inheritable: int) -> Call:
    """A capset(2) call with the three sets as bit sets."""
    words = [half >> shift & 0xFFFF_FFFF for shift in (0, 32) for half in (effective, permitted, inheritable)]
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    return Call(NR.capset, (header, struct.pack("<6I", *words)), name="capset")


def _set_ids(number: int, ids: Sequence[int | None]) -> Call:
    values = tuple(_NO_ID if value is None else value for value in ids[:3])
    return Call(number, values, name=f"{call_name(number)}{values}")


def before_join(puppet: Puppet, wanted: Credentials, now_in: int, uid: Number, gid: Number) -> None:
    """Set what can only be set outside the final user namespace.

    Args:
        puppet: in user namespace `now_in`, with all capabilities there.
        wanted: the task's credentials.
        now_in: a `UserNamespace` index.
        uid, gid: translate ids.

    Raises:
        RebuildError: an id has no number in `now_in` either.
    """
    final = wanted.userns
    _set_groups(puppet, wanted, now_in, gid)
    outside_uids = [i for i in wanted.uids if uid(i, final) is None]
    outside_gids = [i for i in wanted.gids if gid(i, final) is None]
    if not outside_uids and not outside_gids:
        return
    calls = [
        Call(NR.prctl, (PRCTL.SET_SECUREBITS, _KEEP_CAPS | _NO_SETUID_FIXUP, 0, 0, 0), name="securebits")
    ]
    if outside_gids:
        calls.append(_set_ids(NR.setresgid, [_required(i, now_in, gid, "gid") for i in wanted.gids]))
    if outside_uids:
        calls.append(_set_ids(NR.setresuid, [_required(i, now_in, uid, "uid") for i in wanted.uids]))
    puppet.run_checked(calls)


def _required(wanted: Id, namespace: int, number: Number, kind: str) -> int:
    found = number(wanted, namespace)
    if found is None:
        raise RebuildError(
            f"{kind} {wanted.id} of user namespace {wanted.ns} has no mapping in user namespace {namespace}"
        )
    return found


def _set_groups(puppet: Puppet, wanted: Credentials, namespace: int, gid: Number) -> None:
    numbers = [number for number in (gid(i, namespace) for i in wanted.groups) if number is not None]
    if len(numbers) == len(wanted.groups):
        call = Call(NR.setgroups, (len(numbers), struct.pack(f"<{len(numbers)}I", *numbers)), may_fail=True)
        puppet.run([call])
        if call.result >= 0:
            return
    # setgroups is denied (one-id maps of plain users): right only if there is nothing to change
    here = sorted(procfs.status(puppet.tid).groups)
    mapped = _ids_of_our_namespace("gid_map")
    shall = sorted(_seen(i, gid, mapped) for i in wanted.groups)
    if here != shall:
        raise RebuildError(
            f"supplementary groups {shall} cannot be set: setgroups is denied in user namespace "
            f"{namespace}, and the restorer has {here}"
        )


def _ids_of_our_namespace(name: str) -> list[range]:
    return _ids_of(name, os.stat("/proc/self/ns/user").st_ino)


@functools.lru_cache
def _ids_of(name: str, namespace: int) -> list[range]:
    """`namespace`: our own; its maps are written once."""
    del namespace
    with open(f"/proc/self/{name}", "rb") as file:
        lines = [line.split() for line in file]
    return [range(int(inner), int(inner) + int(count)) for inner, _, count in lines]


def _seen(wanted: Id, number: Number, mapped: Sequence[range]) -> int:
    """How /proc shows an id to us: the overflow id where our own user namespace does not map it."""
    found = number(wanted, 0)
    return found if found is not None and any(found in ids for ids in mapped) else OVERFLOW_ID


def after_join(wanted: Credentials, uid: Number, gid: Number, now: procfs.Status) -> Iterator[Call]:
    """Calls that give a puppet its final ids and capabilities; the last ones it needs any for.

    Args:
        wanted: the task's credentials; the puppet is in their user namespace.
        uid, gid: translate ids.
        now: the puppet's status, for the capabilities it has.
    """
    final = wanted.userns
    inheritable, permitted, effective, bounding, ambient = wanted.caps
    have, bound = now.caps[1], now.caps[3]
    yield Call(NR.prctl, (PRCTL.SET_SECUREBITS, _KEEP_CAPS | _NO_SETUID_FIXUP, 0, 0, 0), name="securebits")
    gids = [gid(i, final) for i in wanted.gids]
    uids = [uid(i, final) for i in wanted.uids]
    yield _set_ids(NR.setresgid, gids)
    yield _set_ids(NR.setresuid, uids)
    if gids[3] is not None and gids[3] != gids[1]:
        yield Call(NR.setfsgid, (gids[3],))
    if uids[3] is not None and uids[3] != uids[1]:
        yield Call(NR.setfsuid, (uids[3],))
    yield Call(NR.prctl, (PRCTL.CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0), name="clear ambient capabilities")
    yield capset(have, have, inheritable)
    for bit in _bits(ambient):
        yield Call(NR.prctl, (PRCTL.CAP_AMBIENT, _AMBIENT_RAISE, bit, 0, 0), name=f"raise capability {bit}")
    yield Call(NR.prctl, (PRCTL.SET_SECUREBITS, wanted.securebits, 0, 0, 0), name="securebits")
    for bit in _bits(bound & ~bounding):
        yield Call(NR.prctl, (PRCTL.CAPBSET_DROP, bit, 0, 0, 0), name=f"drop capability {bit}")
    yield capset(effective, permitted, inheritable)


def check_result(thread: Thread, puppet: Puppet, uid: Number, gid: Number) -> None:
    """Compare what the kernel says of a puppet with what it shall have.

    Raises:
        RebuildError: something is different; says what.
    """
    wanted, now = thread.credentials, procfs.status(puppet.tid)
    uids, gids = _ids_of_our_namespace("uid_map"), _ids_of_our_namespace("gid_map")
    pairs = {
        "uids": (list(now.uids), [_seen(i, uid, uids) for i in wanted.uids]),
        "gids": (list(now.gids), [_seen(i, gid, gids) for i in wanted.gids]),
        "supplementary groups": (sorted(now.groups), sorted(_seen(i, gid, gids) for i in wanted.groups)),
        "capabilities": ([f"{c:x}" for c in now.caps], [f"{c:x}" for c in wanted.caps]),
        "no_new_privs": (now.no_new_privs, wanted.no_new_privs),
    }
    for what, (has, shall) in pairs.items():
        if has != shall:
            raise RebuildError(f"thread {thread.pids[0]}: its {what} came out as {has}, wanted {shall}")


def _bits(value: int) -> Iterator[int]:
    return (bit for bit in range(64) if value >> bit & 1)
