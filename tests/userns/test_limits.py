"""Limits of user namespaces: files that were opened before tell what is so now."""

from __future__ import annotations

import os

import pytest

from pipeline.ids import HostPid
from pipeline.image.schema import Extent, Id, UserNamespace
from pipeline.kernel import nsfs
from pipeline.kernel.syscalls import CLONE
from pipeline.ledger import LEDGER
from pipeline.userns.forest import Forest
from pipeline.userns.limits import Limits, limits_of
from pipeline.userns.visit import visit
from tests.userns.making import making, user_pids

pytestmark = pytest.mark.root

_NAME = "max_pid_namespaces"


def _set(fd: int, value: int) -> None:
    def write() -> bytes:
        file = os.open(f"/proc/sys/user/{_NAME}", os.O_WRONLY)
        os.write(file, b"%d" % value)
        return b""

    visit([(fd, CLONE.NEWUSER)], write)


def test_limits_changed_after_they_were_opened() -> None:
    one = UserNamespace(
        index=1,
        parent=0,
        owner=Id(0, 0),
        uid_map=[Extent(0, 100000, 10)],
        gid_map=[Extent(0, 100000, 10)],
        limits={_NAME: 7},
    )
    with making(Forest([UserNamespace(index=0), one])) as keepers:
        pid: HostPid = user_pids(keepers)[1]
        fd = nsfs.open_namespace(pid, "user")
        try:
            with Limits() as limits:
                limits.open([HostPid(os.getpid()), pid, HostPid(2**22)])
                assert len([held for held in LEDGER.held() if "limits" in str(held)]) == 1
                for value in (7, 8):
                    _set(fd, value)
                    assert limits.of(fd, nsfs.key_of(fd)) == {_NAME: value}
                    assert limits_of(fd) == {_NAME: value}
        finally:
            os.close(fd)
    assert not LEDGER.held()
