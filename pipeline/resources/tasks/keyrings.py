"""Keyrings of a task: none is carried; those in use are named.

Keys are secrets that their types guard, and most kinds cannot be read back. A thread or process keyring is refused.
Sessions and users have keyrings, too: those that the tree shares with the pipeline, and those of users of the host, are
the destination's afterwards, as everything external is. One that is the tree's own is refused when it holds a key: a
session keyring that is not ours, and the keyring of a user of the tree's own user namespace.

Only tasks of users who own keys at all are asked: to ask for one of these keyrings makes it.

Sources: keyrings(7), keyctl(2), user-keyring(7), session-keyring(7), proc_key-users(5).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import suppress

from pipeline.errors import Blocker
from pipeline.ids import HostPid
from pipeline.kernel import procfs
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall
from pipeline.remote.calls import Call, Out
from pipeline.userns.forest import OVERFLOW_ID

_GET_KEYRING_ID, _READ = 0, 11
_OWN = {"thread": -1, "process": -2}
_SESSION, _USER, _USER_SESSION = -3, -4, -5
_READ_BYTES = 256
_REMEDY = "let it revoke them (keyctl revoke), or start it in a session of its own without keys"


class Keyrings:
    """The questions to one task.

    Args:
        tid: of the task; `leader`: whether it also answers for its process.
        ask: adds a call that may fail to those that the task will run.
    """

    def __init__(self, tid: HostPid, leader: bool, ask: Callable[..., Call]) -> None:
        self._own = {
            name: ask(NR.keyctl, _GET_KEYRING_ID, number, 0)
            for name, number in _OWN.items()
            if name == "thread" or leader
        }
        self._numbers: dict[int, Call] = {}
        self._content: dict[int, tuple[Call, Out]] = {}
        if leader and _may_have_keys(tid):
            for number in (_SESSION, _USER, _USER_SESSION):
                self._numbers[number] = ask(NR.keyctl, _GET_KEYRING_ID, number, 0)
                room = Out(_READ_BYTES)
                self._content[number] = ask(NR.keyctl, _READ, number, room, _READ_BYTES), room

    def blockers(self, subject: str, own_users: bool) -> Iterator[Blocker]:
        """Keyrings that would be lost.

        Args:
            own_users: the task is in a user namespace of the tree, whose users are the tree's.
        """
        for name, call in self._own.items():
            if call.result > 0:
                yield Blocker(subject, f"has a {name} keyring")
        if not self._numbers:
            return
        session, user, by_default = (self._numbers[number].result for number in self._numbers)
        if session > 0 and session not in {_ours(), by_default} and (count := self._keys(_SESSION, user)):
            yield Blocker(subject, f"uses its session keyring (keys: {count}), which is not carried", _REMEDY)
        if own_users:
            count = self._keys(_USER, user) + self._keys(_USER_SESSION, user)
            if count:
                yield Blocker(
                    subject, f"uses the keyrings of its user (keys: {count}), which are not carried", _REMEDY
                )

    def _keys(self, keyring: int, user: int) -> int:
        """How many keys a keyring holds, the link to the keyring of the user apart."""
        call, room = self._content[keyring]
        size = min(max(call.result, 0), _READ_BYTES)
        return sum(1 for (key,) in struct.iter_unpack("<i", room.data[:size]) if key != user)


def _may_have_keys(tid: HostPid) -> bool:
    """Whether a user whose ids the task has owns any key; who it is may not be to be seen from here."""
    with suppress(OSError), open("/proc/key-users", "rb") as file:
        users = {int(line.split(b":")[0]) for line in file}
        return bool({OVERFLOW_ID, *users} & set(procfs.status(tid).uids))
    return False


def _ours() -> int:
    with suppress(OSError):
        return syscall(NR.keyctl, _GET_KEYRING_ID, _SESSION, 0)
    return 0
