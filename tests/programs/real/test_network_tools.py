"""Programs that live on datagrams, in a network of their own: ping, and a name server with somebody who asks it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import CLONE_NEWNET, DEPTH_1, DEPTH_2
from tests.programs.real.tree import RealTree, count_in, lines_of, needs

pytestmark = pytest.mark.root

#: a question for the address of one.test after the other, when there is a server; each must be answered
ASK = r"""
import os, socket, struct
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(60)
sock.connect(("127.0.0.1", 5353))
done = os.open("done", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
number = 0
while not os.path.exists("stop"):
    number += 1
    name = b"\x03one\x04test\x00"
    sock.send(struct.pack(">6H", number & 0xFFFF, 0x100, 1, 0, 0, 0) + name + struct.pack(">2H", 1, 1))
    answer = sock.recv(512)
    assert struct.unpack(">H", answer[:2])[0] == number & 0xFFFF, answer
    assert answer.endswith(bytes([192, 0, 2, 7])), answer
    os.pwrite(done, b"%d\n" % number, 0)
"""
SERVER = """
ip link set lo up
dnsmasq -k -p 5353 --no-resolv --no-hosts --pid-file= --user=root --conf-file=/dev/null \
  --host-record=one.test,192.0.2.7 &
server=$!
until grep -q ':14E9 ' /proc/net/udp; do sleep 0.05; done
python3 -S -E -c "$1" && touch well
kill $server
wait
"""


@needs("ping=iputils-ping", "ip=iproute2")
def test_ping(launch: Callable[..., RealTree], tmp_path: Path) -> None:
    setting = DEPTH_2.with_kinds("depth2", CLONE_NEWNET)
    script = "ip link set lo up; exec ping -i 0.05 127.0.0.1 > replies"
    tree = launch(setting, ["sh", "-c", script], lines_of("replies"))
    tree.all_ways(tmp_path)
    tree.finish()
    found = re.findall(r"icmp_seq=(\d+) ttl=64 time=", (tree.directory / "replies").read_text())
    assert list(map(int, found)) == list(range(1, len(found) + 1)), "a reply is lost or doubled"


@needs("dnsmasq=dnsmasq-base", "ip=iproute2")
def test_a_name_server(launch: Callable[..., RealTree], tmp_path: Path) -> None:
    setting = DEPTH_1.with_kinds("depth1", CLONE_NEWNET)
    tree = launch(setting, ["sh", "-c", SERVER, "sh", ASK], count_in("done"))
    tree.all_ways(tmp_path)
    (tree.directory / "stop").touch()
    tree.finish(None)
    assert (tree.directory / "well").exists(), tree.log()
