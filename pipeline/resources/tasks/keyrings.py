"""Keyrings of a task: a session keyring of the tree is carried with its keys; others in use are named.

Sessions and users have keyrings: those that the tree shares with the pipeline, and those of users of the host, are
the destination's afterwards, as everything external is. A session keyring that is not ours and holds keys is made
again, as systemd gives one to each service: with keys of type ``user``, which can be read back, their owners and
permissions, and the link to the keyring of the user. Who shares it with a parent shares it afterwards.

Refused: keys of other types, which guard what they hold; keys that expire, or are too long; a thread or process
keyring; keys in the keyring of a user of the tree's own user namespace. Not preserved: serial numbers; that a key
expires which only the task itself may see.

Only tasks of users who own keys at all are asked: to ask for one of these keyrings makes it.

Sources: keyrings(7), keyctl(2), user-keyring(7), session-keyring(7), proc_key-users(5), proc_keys(5).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress

from pipeline.errors import Blocker, RebuildError
from pipeline.image.schema import Id, Key, Process, SessionKeyring
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL, syscall
from pipeline.remote.calls import Call, Out
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support
from pipeline.userns.forest import OVERFLOW_ID, IdKind

_GET_KEYRING_ID, _JOIN_SESSION_KEYRING, _SETPERM, _DESCRIBE, _LINK, _READ = 0, 1, 5, 6, 8, 11
_OWN = {"thread": -1, "process": -2}
_SESSION, _USER, _USER_SESSION = -3, -4, -5
#: 64 keys
_READ_BYTES = 256
_LONGEST_BYTES = 1024
_KEEP_CAPS, _NO_SETUID_FIXUP = 1 << 4, 1 << 2
_REMEDY = "let it revoke them (keyctl revoke), or start it in a session of its own without keys"

SUPPORT = Support(
    kind="keyrings",
    carried=(
        "a session keyring of the tree: keys of type user, owners, permissions, the link to the user's",
    ),
    refused=(
        "keys of other types, of more than 1024 bytes, or that expire; thread and process keyrings",
        "keys of users of the tree's own user namespaces",
    ),
    shown_by=("programs/keys.py", "resources/test_tasks_state.py"),
)


class Keyrings:
    """The questions to one task.

    Args:
        users: its uids, as they are seen from here.
        leader: whether it also answers for its process.
        ask: adds a call that may fail to those that the task will run.
    """

    def __init__(self, users: Collection[int], leader: bool, ask: Callable[..., Call]) -> None:
        self._own = {
            name: ask(NR.keyctl, _GET_KEYRING_ID, number, 0)
            for name, number in _OWN.items()
            if name == "thread" or leader
        }
        self._numbers: dict[int, Call] = {}
        self._content: dict[int, tuple[Call, Out]] = {}
        #: of each key in the session keyring, and of that itself: what it is, and what it holds
        self._keys: dict[int, tuple[tuple[Call, Out], tuple[Call, Out]]] = {}
        if leader and _may_have_keys(users):
            for number in (_SESSION, _USER, _USER_SESSION):
                self._numbers[number] = ask(NR.keyctl, _GET_KEYRING_ID, number, 0)
                room = Out(_READ_BYTES)
                self._content[number] = ask(NR.keyctl, _READ, number, room, _READ_BYTES), room

    def further(self, ask: Callable[..., Call]) -> None:
        """The questions that follow from the first answers; none, as a rule."""
        if self._is_own_session() and self._serials(_SESSION):
            for serial in (_SESSION, *self._serials(_SESSION)):
                what, held = Out(_LONGEST_BYTES), Out(_LONGEST_BYTES)
                self._keys[serial] = (
                    (ask(NR.keyctl, _DESCRIBE, serial, what, _LONGEST_BYTES), what),
                    (ask(NR.keyctl, _READ, serial, held, _LONGEST_BYTES), held),
                )

    def _is_own_session(self) -> bool:
        if not self._numbers:
            return False
        session, _, by_default = (self._numbers[number].result for number in self._numbers)
        return session > 0 and session not in {_ours(), by_default}

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
        if self._content[_SESSION][0].result > _READ_BYTES and self._is_own_session():
            yield Blocker(subject, "has more keys in its session keyring than are carried", _REMEDY)
        expiring = _expiring() if self._keys else set()
        for serial in self._keys.keys() - {_SESSION}:
            reason = self._wrong(serial) or (
                "expires, and when cannot be set to the same" if serial in expiring else ""
            )
            if reason:
                yield Blocker(subject, f"has a key in its session keyring that {reason}", _REMEDY)
        if own_users:
            count = len(self._serials(_USER)) + len(self._serials(_USER_SESSION))
            if count:
                yield Blocker(
                    subject, f"uses the keyrings of its user (keys: {count}), which are not carried", _REMEDY
                )

    def _wrong(self, serial: int) -> str:
        """Why a key is not carried; empty: it is."""
        (described, what), (read, _) = self._keys[serial]
        if described.result < 0:
            return f"it may not look at ({errno.errorcode.get(-described.result, described.result)})"
        kind = what.data.split(b";")[0].decode(errors="replace")
        if kind != "user":
            return f"is of type {kind}, which nobody can read back"
        if read.result < 0:
            return f"it may not read ({errno.errorcode.get(-read.result, read.result)})"
        if max(read.result, described.result) > _LONGEST_BYTES:
            return f"has {read.result} bytes"
        return ""

    def _serials(self, keyring: int) -> list[int]:
        """The keys that a keyring holds, the link to the keyring of the user apart."""
        call, room = self._content[keyring]
        size = min(max(call.result, 0), _READ_BYTES)
        user = self._numbers[_USER].result
        return [key for (key,) in struct.iter_unpack("<i", room.data[:size]) if key != user]

    def session(self, userns: int) -> SessionKeyring | None:
        """The session keyring, if it is the tree's and holds keys.

        Args:
            userns: the `UserNamespace` index of the task, in which the kernel says ids to it.
        """
        if not self._keys:
            return None
        _, uid, gid, permissions, _ = self._said(_SESSION)
        call, room = self._content[_SESSION]
        linked = {key for (key,) in struct.iter_unpack("<i", room.data[: max(call.result, 0)])}
        keys = []
        for serial, (_, (read, held)) in self._keys.items():
            if serial != _SESSION:
                _, owner, group, bits, name = self._said(serial)
                payload = held.data[: read.result]
                keys.append(Key(name, payload, Id(userns, owner), Id(userns, group), bits))
        return SessionKeyring(
            number=self._numbers[_SESSION].result,
            permissions=permissions,
            uid=Id(userns, uid),
            gid=Id(userns, gid),
            with_user=self._numbers[_USER].result in linked,
            keys=keys,
        )

    def _said(self, serial: int) -> tuple[bytes, int, int, int, bytes]:
        """Type, uid, gid, permissions and description of a key."""
        (call, what), _ = self._keys[serial]
        kind, uid, gid, permissions, name = what.data[: call.result].rstrip(b"\0").split(b";", 4)
        return kind, int(uid), int(gid), int(permissions, 16), name


def _may_have_keys(users: Collection[int]) -> bool:
    """Whether one of these users owns any key; who does may not be to be seen from here."""
    with suppress(OSError), open("/proc/key-users", "rb") as file:
        owners = {int(line.split(b":")[0]) for line in file}
        return not {OVERFLOW_ID, *owners}.isdisjoint(users)
    return False


def _expiring() -> set[int]:
    """The keys that we may see and that expire."""
    with suppress(OSError), open("/proc/keys", "rb") as file:
        lines = [line.split() for line in file]
        return {int(line[0], 16) for line in lines if line[3] != b"perm"}
    return set()


def _ours() -> int:
    with suppress(OSError):
        return syscall(NR.keyctl, _GET_KEYRING_ID, _SESSION, 0)
    return 0


def _ids_of(process: Process) -> Sequence[Id]:
    return process.threads[0].credentials.uids if process.threads else ()


# -- making -----------------------------------------------------------------------------------


class SessionKeyrings:
    """Makes them again; `notes`: who has a copy of one that was shared.

    Args:
        number: what an id is called in a user namespace; None: it has no number there.
    """

    def __init__(self, number: Callable[[Id, int, IdKind], int | None]) -> None:
        self._number = number
        self._made: dict[int, int] = {}
        self.notes: list[str] = []

    def give(self, process: Process, puppet: Puppet) -> None:
        """Give a process, which is in its namespaces, the session keyring that it had.

        Raises:
            RebuildError: the kernel refuses it.
        """
        wanted = process.session_keyring
        if wanted is None:
            if self._made and self._now(puppet) in self._made.values():
                self.notes.append(f"pid {process.pids[0]}: it has the session keyring of its parent")
            return
        if self._made.get(wanted.number) == self._now(puppet):
            return
        if wanted.number in self._made:
            self.notes.append(f"pid {process.pids[0]}: it has a copy of the session keyring that it shared")
        try:
            if any(self._number(one, process.namespaces.user, "uid") is None for one in _ids_of(process)):
                # those were set further out, and would be lost with the change of ids that this takes
                self.notes.append(f"pid {process.pids[0]}: it has the session keyring of its surroundings")
                return
            self._make(wanted, process.namespaces.user, puppet)
        except OSError as error:
            raise RebuildError(f"pid {process.pids[0]}: its session keyring: {error}") from error
        self._made.setdefault(wanted.number, self._now(puppet))

    @staticmethod
    def _now(puppet: Puppet) -> int:
        try:
            return puppet.syscall(NR.keyctl, _GET_KEYRING_ID, _SESSION, 0)
        except OSError:  # a kernel without keys, a session that was revoked
            return 0

    def _make(self, wanted: SessionKeyring, userns: int, puppet: Puppet) -> None:
        bits = _KEEP_CAPS | _NO_SETUID_FIXUP
        puppet.syscall(NR.prctl, PRCTL.SET_SECUREBITS, bits, 0, 0, 0)
        self._act_as(puppet, wanted.uid, wanted.gid, userns)
        puppet.syscall(NR.keyctl, _JOIN_SESSION_KEYRING, 0)
        for key in wanted.keys:
            self._act_as(puppet, key.uid, key.gid, userns)
            serial = puppet.syscall(
                NR.add_key, b"user\0", key.description + b"\0", key.payload, len(key.payload), _SESSION
            )
            puppet.syscall(NR.keyctl, _SETPERM, serial, key.permissions)
        self._act_as(puppet, wanted.uid, wanted.gid, userns)
        if wanted.with_user:
            puppet.syscall(NR.keyctl, _LINK, _USER, _SESSION)
        puppet.syscall(NR.keyctl, _SETPERM, _SESSION, wanted.permissions)

    def _act_as(self, puppet: Puppet, uid: Id, gid: Id, userns: int) -> None:
        """Take ids, whose what is made now will be; those that the process shall have are set when it is complete."""
        for call, one, kind in ((NR.setresgid, gid, "gid"), (NR.setresuid, uid, "uid")):
            number = self._number(one, userns, kind)  # type: ignore[arg-type]
            if number is not None:
                puppet.syscall(call, number, number, number)
