"""nftables rules of a network: what cannot be made again is refused by name, at the dump and at the restore."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.kernel import nfnetlink
from pipeline.kernel.rtnetlink import attribute
from pipeline.kernel.syscalls import CLONE, PRCTL, prctl, unshare
from pipeline.resources.namespaces import nftables
from pipeline.userns import cradle
from tests.harness.settings import DEPTH_0, DEPTH_1, Setting
from tests.harness.tree import Tree, dump, engine, said
from tests.userns.making import captured, held, in_child, made_again, own_namespace, refused

pytestmark = pytest.mark.root
MAPS = [None, "0 100000 65536", "1000 100000 10"]
_NFT = nftables.find() or "nft"


def nft(*words: str, text: str | None = None) -> str:
    done = subprocess.run([_NFT, *words], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr)
    return done.stdout


def in_own_network(text: str) -> Callable[[], None]:
    def act() -> None:
        unshare(CLONE.NEWNET)
        nft("-f", "-", text=text)

    return act


@pytest.mark.parametrize("id_map", MAPS[:2])
def test_rules_are_loaded_again(id_map: str | None) -> None:
    rules = "table inet one {\n\tchain two {\n\t\ttcp dport 80 counter packets 7 bytes 700 drop\n\t}\n}\n"
    with held(in_own_network(rules), id_map) as pid, made_again(pid, "net") as (record, again):
        assert record.state["ruleset"].decode() == rules
        assert own_namespace(captured(again)[0], "net").state == record.state


@pytest.mark.parametrize("rules", ["", "table inet one {\n\tchain two {\n\t}\n}\n"])
def test_a_lock_of_our_own_is_no_rule_of_the_tree(rules: str) -> None:
    def locked() -> None:
        unshare(CLONE.NEWNET)
        nft("-f", "-", text=rules)
        sock = nfnetlink.open_socket()
        nfnetlink.make_lock(sock, nfnetlink.LOOKING + "0123456789abcdef", (), [(b"", 80)], owned=True)
        sock.detach()

    with held(locked) as pid, made_again(pid, "net") as (record, _):
        assert record.state["ruleset"].decode() == rules


def test_no_rules_ask_for_no_nft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "find", lambda: None)
    with held(lambda: unshare(CLONE.NEWNET)) as pid:
        assert not captured(pid)[0].blockers


def test_rules_without_nft_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with held(in_own_network("table ip some {}")) as pid:
        monkeypatch.setattr(nftables, "_SBIN", str(tmp_path))
        monkeypatch.setenv("PATH", str(tmp_path))
        assert "has nftables rules, and there is no nft here to read them (install nftables)" in refused(pid)


def test_a_table_of_a_netlink_socket_is_refused() -> None:
    def act() -> None:
        unshare(CLONE.NEWNET)
        owner = subprocess.Popen([_NFT, "-i"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert owner.stdin is not None
        owner.stdin.write(b"add table inet mine { flags owner; }\n")
        owner.stdin.flush()
        deadline = time.monotonic() + 60
        while "mine" not in nft("list", "tables"):
            if time.monotonic() > deadline:
                raise OSError("the table does not come")
            time.sleep(0.01)
        _kept.append(owner)

    with held(act) as pid:
        assert "table mine, which belongs to a netlink socket" in refused(pid)


_kept: list[object] = []


def test_a_match_of_iptables_is_not_lost() -> None:
    """What iptables-nft makes: a rule with a match that nft cannot say."""

    def message(kind: int, family: int, resource: int, content: bytes, flags: int = 0) -> bytes:
        head = struct.pack("<IHHII", 20 + len(content), kind, 1 | flags, 0, 0)
        return head + struct.pack(">BBH", family, 0, resource) + content

    def text(kind: int, value: bytes) -> bytes:
        return attribute(kind, value + b"\0")

    def nested(kind: int, *content: bytes) -> bytes:
        return attribute(kind | 0x8000, b"".join(content))

    def act() -> None:
        unshare(CLONE.NEWNET)
        match = text(1, b"comment") + attribute(2, bytes(4)) + attribute(3, b"of iptables".ljust(256, b"\0"))
        expression = nested(1, text(1, b"match"), nested(2, match))
        own, create = 10 << 8, 0x400
        batch = (
            message(16, 0, 10, b"")
            + message(own | 0, socket.AF_INET, 0, text(1, b"filter"), create)
            + message(own | 3, socket.AF_INET, 0, text(1, b"filter") + text(3, b"INPUT"), create)
            + message(
                own | 6,
                socket.AF_INET,
                0,
                text(1, b"filter") + text(2, b"INPUT") + nested(4, expression),
                create | 4,
            )
            + message(17, 0, 10, b"")
        )
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as netlink:
            netlink.send(batch)
            answer = netlink.recv(1 << 16)
        (code,) = struct.unpack_from("<i", answer, 16)
        if code:
            raise OSError(-code, os.strerror(-code))

    with held(act) as pid:
        assert "nftables rules that nft cannot make again: " in refused(pid)


def _restored(image: Path, *options: str, before: str = "true") -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-m", "sh", "-c", f'{before} && exec "$@"', "sh", sys.executable, "-m", "pipeline"]
    return subprocess.run(
        [*command, "restore", "--from", str(image), "--detach", *options],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("setting", [DEPTH_0, DEPTH_1], ids=lambda s: s.name)
def test_a_host_without_nft_refuses_before_it_begins(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    tree = start("firewalled", setting)
    dump(tree, tmp_path / "image")
    done = _restored(tmp_path / "image", before=f"mount --bind /dev/null {_NFT}")
    assert done.returncode == 3, said(done)
    assert "there is no nft here to load them (install nftables)" in done.stderr
    done = engine("restore", "--from", tmp_path / "image", "--detach")
    assert done.returncode == 0, said(done)
    tree.check()


def test_ids_in_rules_move_with_the_tree(start: Callable[..., Tree], tmp_path: Path) -> None:
    """A rule's uid is a number of the user namespace that owns the network, which does not see where it lies."""
    tree = start("firewalled", DEPTH_1)
    dump(tree, tmp_path / "image")
    done = engine("restore", "--from", tmp_path / "image", "--detach", "--map", "3000000:65536")
    assert done.returncode == 0, said(done)
    assert "3000000" in Path(f"/proc/{tree.pid}/uid_map").read_text()
    tree.check()


def test_ids_in_rules_of_a_network_of_the_surroundings_are_refused_elsewhere(
    start: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = start("firewalled")
    dump(tree, tmp_path / "image")
    options = ["--map", "3000000:65536", "--unmapped", "overflow"]
    done = engine("restore", "--from", tmp_path / "image", "--detach", *options)
    assert done.returncode == 3, said(done)
    assert "rules for uids or gids (skuid, skgid), and --map gives these ids other numbers" in done.stderr


def test_rules_of_a_plain_user_who_is_not_root_inside() -> None:
    """Whoever is not root in the owner of the network would lose all capabilities by executing nft."""
    user = 61_234

    def body() -> None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        prctl(PRCTL.SET_DUMPABLE, 1)
        assert not cradle.is_privileged()

        def act() -> None:
            nftables._keep_capabilities()
            in_own_network("table ip some {}")()

        with held(act, f"1000 {user} 1") as pid:
            capture, _ = captured(pid)
            assert not capture.blockers, capture.blockers
            assert own_namespace(capture, "net").state["ruleset"] == b"table ip some {\n}\n"

    in_child(body)
