"""uts and ipc namespaces: names, limits, and what is refused."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
from pathlib import Path

import pytest

from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, mount, syscall, unshare
from pipeline.resources.namespaces import posix_queues
from tests.userns.making import captured, held, made_again, own_namespace, refused

pytestmark = pytest.mark.root
MAPS = [None, "0 100000 65536", "1000 100000 10"]
_PRIVATE = 0x40000 | 0x4000


def name_it() -> None:
    unshare(CLONE.NEWUTS)
    syscall(NR.sethostname, b"inside.example", 14)
    syscall(NR.setdomainname, b"(none of yours)", 15)


@pytest.mark.parametrize("id_map", MAPS)
def test_host_and_domain_name(id_map: str | None) -> None:
    with held(name_it, id_map) as pid, made_again(pid, "uts") as (record, again):
        assert record.state == {"hostname": b"inside.example", "domainname": b"(none of yours)"}
        capture, _ = captured(again)
        assert own_namespace(capture, "uts").state == record.state
        assert record.owner == (1 if id_map else 0)
    assert os.uname().nodename != "inside.example"


def test_empty_names() -> None:
    def act() -> None:
        unshare(CLONE.NEWUTS)
        syscall(NR.sethostname, b"", 0)
        syscall(NR.setdomainname, b"", 0)

    with held(act) as pid, made_again(pid, "uts") as (_, again):
        state = own_namespace(captured(again)[0], "uts").state
        assert state == {"hostname": b"", "domainname": b""}


SYSCTLS = {
    "kernel/msgmax": "4096",
    "kernel/sem": "100\t32000\t50\t77",
    "kernel/shmmax": "1048576",
    "kernel/shm_rmid_forced": "1",
    "fs/mqueue/queues_max": "17",
    "fs/mqueue/msg_default": "9",
}


def limit_it() -> None:
    unshare(CLONE.NEWIPC)
    for name, value in SYSCTLS.items():
        fd = os.open(f"/proc/sys/{name}", os.O_WRONLY)
        os.write(fd, value.encode())
        os.close(fd)


@pytest.mark.parametrize("id_map", MAPS[:2])
def test_limits_of_an_ipc_namespace(id_map: str | None) -> None:
    with held(limit_it, id_map) as pid, made_again(pid, "ipc") as (record, again):
        expected = {name: value.encode() for name, value in SYSCTLS.items()}
        assert record.state["sysctls"] == expected
        assert own_namespace(captured(again)[0], "ipc").state == record.state


def test_fresh_ipc_namespace_without_root_inside() -> None:
    with held(lambda: unshare(CLONE.NEWIPC), MAPS[2]) as pid, made_again(pid, "ipc") as (record, again):
        assert record.state == {"sysctls": {}, "segments": [], "semaphores": [], "queues": [], "posix": []}
        assert own_namespace(captured(again)[0], "ipc").state == record.state


@pytest.mark.parametrize("id_map", MAPS[:2])
def test_posix_message_queues(id_map: str | None) -> None:
    def act() -> None:
        unshare(CLONE.NEWIPC)
        os.close(posix_queues.make(b"here", posix_queues.Room(7, 99), [], 0o640))

    with held(act, id_map) as pid, made_again(pid, "ipc") as (record, again):
        ((name, permissions, room, _),) = record.state["posix"]
        assert (name, permissions[1], room) == (b"here", 0o640, [7, 99])
        assert own_namespace(captured(again)[0], "ipc").state == record.state


def test_a_posix_message_queue_that_tells_somebody_is_refused() -> None:
    def act() -> None:
        unshare(CLONE.NEWIPC)
        queue = posix_queues.make(b"here", posix_queues.Room(7, 99), [], 0o640)
        syscall(NR.mq_notify, queue, struct.pack("<Qii48x", 0, signal.SIGUSR1, 0))

    with held(act) as pid:
        assert "POSIX message queue /here, which tells a process" in refused(pid)


def test_a_segment_of_huge_pages_is_refused() -> None:
    """Only the initial user namespace may make one."""
    huge, no_reserve = 0o4000, 0o10000

    def act() -> None:
        unshare(CLONE.NEWIPC)
        syscall(NR.shmget, 0, 2 << 20, 0o1600 | huge | no_reserve)

    def register(fd: int, size_bytes: int) -> int:
        raise AssertionError(f"{size_bytes} bytes are taken from {fd}")

    with held(act) as pid:
        capture, _ = captured(pid)
        with pytest.raises(OSError, match="consists of huge pages"):
            capture.take_contents(register)


@pytest.mark.parametrize("id_map", MAPS[:2])
def test_objects_of_an_ipc_namespace_are_made_again(id_map: str | None) -> None:
    """tests/programs/sysv.py looks at them from inside; here their ids and identifiers are compared."""

    def act() -> None:
        unshare(CLONE.NEWIPC)
        for number in range(3):
            syscall(NR.semget, 0, 2, 0o1600)
            syscall(NR.msgget, 77 + number, 0o1640)
        syscall(NR.semctl, 1, 0, 0)  # IPC_RMID: the next identifier is another one

    with held(act, id_map) as pid, made_again(pid, "ipc") as (record, again):
        assert [one[0] for one in record.state["semaphores"]] == [0, 2]
        assert len(record.state["queues"]) == 3
        assert own_namespace(captured(again)[0], "ipc").state == record.state


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("ip link add one type veth peer name two && tc qdisc add dev one root netem delay 1ms", "netem"),
        ("ip rule del priority 32767", "a routing rule less"),
        ("ip link add one type ifb", "of kind ifb"),
    ],
)
def test_what_a_network_holds_and_is_not_carried_is_named(command: str, words: str) -> None:
    def act() -> None:
        unshare(CLONE.NEWNET)
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(done.stderr)

    try:
        with held(act) as pid:
            capture, _ = captured(pid)
            assert any(words in str(blocker) for blocker in capture.blockers), capture.blockers
    except AssertionError as error:
        if any(reason in str(error) for reason in ("Unknown device type", "not found", "qdisc")):
            pytest.skip(f"this machine cannot make one: {error}")
        raise


def test_nothing_of_the_looking_stays(tmp_path: Path) -> None:
    def act() -> None:
        unshare(CLONE.NEWIPC | CLONE.NEWNS)
        mount(None, b"/", None, _PRIVATE)

    with held(act) as pid:
        before = Path(f"/proc/{pid}/mountinfo").read_bytes()
        assert not captured(pid)[0].blockers
        assert Path(f"/proc/{pid}/mountinfo").read_bytes() == before
