"""Who is in the networks of a tree, and reads their sysctls, from look to look."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest

from pipeline.ids import LocalFd
from pipeline.kernel import nsfs
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.ledger import LEDGER
from pipeline.resources.namespaces import kept_networks
from pipeline.resources.namespaces.kept_networks import KeptNetworks, walk
from pipeline.userns.visit import Way, fetch, visit

pytestmark = pytest.mark.root

FORWARD = "ipv4/conf/lo/forwarding"


@contextmanager
def network() -> Iterator[Way]:
    """The way into a fresh one."""

    def made() -> int:
        unshare(CLONE.NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    fd = fetch([], made)
    try:
        yield [(fd, CLONE.NEWNET)]
    finally:
        os.close(fd)


def ip(way: Way, *arguments: str) -> None:
    """Run ip(8) there."""
    command = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{way[0][0]}", "ip", *arguments]
    subprocess.run(command, check=True)


def set_there(way: Way, name: str, value: bytes) -> None:
    """Set a sysctl there."""

    def write() -> bytes:
        with open(f"/proc/sys/net/{name}", "wb") as file:
            file.write(value)
        return b""

    visit(way, write)


def wanted(name: str) -> bool:
    """Those of devices that are quick to read."""
    return name.startswith("ipv4/conf/") or name == "ipv4/ip_default_ttl"


def there(way: Way, is_wanted: Callable[[str], bool] = wanted) -> dict[str, bytes]:
    """What a visitor reads who has just come."""
    text = visit(way, lambda: repr(dict(walk(is_wanted))).encode())
    found: dict[str, bytes] = eval(text)
    return found


def test_values_of_now_are_read_from_files_that_were_opened_before() -> None:
    held = LEDGER.held()
    with network() as way, closing(KeptNetworks()) as kept:
        first = kept.sysctls(way, ["lo"], wanted)
        assert first is not None
        assert first == there(way)
        assert FORWARD in first
        set_there(way, FORWARD, b"1" if first[FORWARD] == b"0" else b"0")
        set_there(way, "ipv4/ip_default_ttl", b"77")
        opened = LEDGER.held()
        second = kept.sysctls(way, ["lo"], wanted)
        assert LEDGER.held() == opened
        assert second is not None
        assert second == there(way)
        assert second["ipv4/ip_default_ttl"] == b"77"
        assert second[FORWARD] != first[FORWARD]
    assert LEDGER.held() == held


@pytest.mark.parametrize("most", [0, 1], ids=["walks", "keeps"])
def test_long_values_are_whole(most: int) -> None:
    """One that is much longer than what values are read with first; one that is as long, with its newline."""
    name = "ipv4/ip_local_reserved_ports"
    ports = [b"%d" % port for port in range(10001, 20001, 2)]
    with network() as way, closing(KeptNetworks(most)) as kept:
        for value in (b",".join(ports), b",".join([b"7", *ports[:85]])):
            set_there(way, name, value)
            for _ in range(2):
                found = kept.sysctls(way, ["lo"], name.__eq__)
                assert (found is None) == (most == 0)
                assert (found or there(way, name.__eq__)) == {name: value}


def test_devices_that_come_and_go() -> None:
    with network() as way, closing(KeptNetworks()) as kept:
        kept.sysctls(way, ["lo"], wanted)
        ip(way, "link", "add", "d0", "type", "bridge")
        found = kept.sysctls(way, ["lo", "d0"], wanted)
        assert found == there(way)
        assert any("/d0/" in name for name in found or ())
        # under the same name: its files are those of a device that is gone
        ip(way, "link", "del", "d0")
        ip(way, "link", "add", "d0", "type", "bridge")
        set_there(way, "ipv4/conf/d0/forwarding", b"1")
        assert kept.sysctls(way, ["lo", "d0"], wanted) == there(way)
        ip(way, "link", "del", "d0")
        assert kept.sysctls(way, ["lo"], wanted) == there(way)


@pytest.mark.parametrize("part", [0, 8], ids=["tries", "knows"])
def test_who_may_open_few_files_reads_them_all_the_same(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(kept_networks, "_PART", part)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with network() as way, closing(KeptNetworks()) as kept:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        try:
            found = [kept.sysctls(way, ["lo"], wanted) for _ in range(2)]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert found == [there(way)] * 2


def test_looks_and_sockets_are_those_of_the_network() -> None:
    with network() as way, closing(KeptNetworks()) as kept:
        inode = nsfs.key_of(LocalFd(way[0][0])).inode
        for _ in range(2):
            link = kept.look(way, lambda: os.readlink("/proc/thread-self/ns/net").encode())
            assert link == b"net:[%d]" % inode
        assert os.stat("/proc/thread-self/ns/net").st_ino != inode


def test_more_networks_than_are_kept() -> None:
    with network() as first, network() as second, closing(KeptNetworks(1)) as kept:
        assert kept.sysctls(first, ["lo"], wanted) == there(first)
        assert kept.sysctls(second, ["lo"], wanted) is None
        inode = nsfs.key_of(LocalFd(second[0][0])).inode
        link = kept.look(second, lambda: os.readlink("/proc/thread-self/ns/net").encode())
        assert link == b"net:[%d]" % inode


def test_who_is_kept_in_a_network_leaves_it() -> None:
    """A device of the other end shows whether the network is still there."""
    with network() as outer:
        with network() as way, closing(KeptNetworks()) as kept:
            kept.sysctls(way, ["lo"], wanted)
            there_fd = f"/proc/{os.getpid()}/fd/{way[0][0]}"
            ip(outer, "link", "add", "here", "type", "veth", "peer", "name", "there")
            ip(outer, "link", "set", "there", "netns", there_fd)
            assert b"here" in _devices(outer)
        for _ in range(500):
            if b"here" not in _devices(outer):
                return
        pytest.fail("its network is still there")


def _devices(way: Way) -> bytes:
    def look() -> bytes:
        with open("/proc/thread-self/net/dev", "rb") as file:
            return file.read()

    return visit(way, look)


def test_who_cannot_be_told_from_others_leaves_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /proc; a thread that stayed would keep the interpreter from its end, too."""
    genuine = os.readlink

    def readlink(path: str) -> str:
        if path == "/proc/thread-self":
            raise FileNotFoundError(path)
        return genuine(path)

    with network() as one, network() as other:
        kept = KeptNetworks()
        for way in (one, other):
            kept.look(way, lambda: b"")
        monkeypatch.setattr(os, "readlink", readlink)
        kept.close()
    assert not any(thread.name == "visitor" for thread in threading.enumerate())
    assert not LEDGER.held()
