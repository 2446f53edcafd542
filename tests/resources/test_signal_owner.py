"""Who is sent the signals of an open file: kept with the ids of who said so, or refused."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Any

import pytest

from pipeline.ids import LocalFd
from pipeline.image.schema import Id, Owner
from pipeline.resources import signal_owner
from tests.resources.fdharness import Capture, subject

pytestmark = pytest.mark.root

F_SETSIG, F_GETSIG, F_GETOWNER_UIDS = 10, 11, 17


def test_signals_to_somebody_outside_are_refused() -> None:
    me = os.getpid()

    def setup() -> tuple[int, int, int]:
        outwards, inwards, to_a_group = os.pipe()[0], os.pipe()[0], os.pipe()[0]
        fcntl.fcntl(outwards, fcntl.F_SETOWN, me)
        fcntl.fcntl(inwards, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(to_a_group, fcntl.F_SETOWN, -os.getpgid(me))
        return outwards, inwards, to_a_group

    with subject(setup) as child, Capture(child.pid) as capture:
        outwards, inwards, to_a_group = map(capture.view, child.result)
        (blocker,) = signal_owner.check(outwards, capture.member)
        assert f"sends its signals to pid {me}, which is not part of the tree" in str(blocker)
        assert not list(signal_owner.check(inwards, capture.member))
        (blocker,) = signal_owner.check(to_a_group, capture.member)
        assert f"process group {os.getpgid(me)}" in str(blocker)


@pytest.mark.parametrize(("uid", "euid"), [(0, 0), (7, 7), (7, 8)])
def test_the_ids_of_who_said_so_are_kept(uid: int, euid: int) -> None:
    reader, writer = os.pipe()
    try:
        owner = Owner(1, 1, 34, Id(0, uid), Id(0, euid))
        signal_owner.create(LocalFd(reader), owner, lambda _: os.getpid(), lambda one: one.id)
        assert fcntl.fcntl(reader, fcntl.F_GETOWN) == os.getpid()
        assert fcntl.fcntl(reader, F_GETSIG) == 34
        assert struct.unpack("<2I", fcntl.fcntl(reader, F_GETOWNER_UIDS, bytes(8))) == (uid, euid)
        assert (os.getuid(), os.geteuid()) == (0, 0)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM], ids=["it does not tell", "it will not"])
def test_ids_that_cannot_be_had_are_left_out_by_a_kernel_that_does_not_tell_only(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def setup() -> int:
        reader = os.pipe()[0]
        fcntl.fcntl(reader, fcntl.F_SETOWN, os.getpid())
        return reader

    genuine = fcntl.fcntl

    def refusing(fd: int, command: int, *arguments: Any) -> Any:
        if command == F_GETOWNER_UIDS:
            raise OSError(code, os.strerror(code))
        return genuine(fd, command, *arguments)

    with subject(setup) as child, Capture(child.pid) as capture:
        view = capture.view(child.result)
        monkeypatch.setattr(fcntl, "fcntl", refusing)
        if code == errno.EPERM:
            with pytest.raises(PermissionError):
                signal_owner.capture(view, capture.member)
        else:
            owner = signal_owner.capture(view, capture.member)
            assert owner is not None
            assert owner.uid is owner.euid is None
