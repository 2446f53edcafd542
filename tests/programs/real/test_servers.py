"""Servers with their clients connected: Redis and nginx. No error, no lost write, no connection ends."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness.networks import THEIRS, bridged_network, plug, within
from tests.harness.settings import CLONE_NEWNET
from tests.harness.tree import Workshop, reap
from tests.programs.real.servers import CLIENTS, COUNT, REDIS, all_is_well, outside, redis_and_clients
from tests.programs.real.tree import DEPTHS, RealTree, count_in, needs

pytestmark = pytest.mark.root

#: each with a network of its own
SETTINGS = tuple(setting.with_kinds(setting.name, CLONE_NEWNET) for setting in DEPTHS)


@pytest.fixture
def around() -> Iterator[str]:
    with bridged_network() as path:
        yield path


def written(directory: Path, name: str, text: str) -> Path:
    path = directory / name
    path.write_text(text)
    path.chmod(0o644)
    return path


@needs("redis-server=redis-server", "ip=iproute2")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_redis_with_clients_in_its_network(
    launch: Callable[..., RealTree], workshop: Workshop, setting: object, tmp_path: Path
) -> None:
    directory = workshop.directory()
    command = [workshop.python, "-S", "-s", "-E", "-B", CLIENTS, "127.0.0.1", str(COUNT), *REDIS]
    tree = launch(setting, command, count_in("rounds"), directory=directory, sources=[CLIENTS])
    tree.wait("every client is served", lambda: count_in("rounds")(directory) > 2)
    tree.all_ways(tmp_path)
    tree.finish()
    all_is_well(directory)


def all_ways_connected(tree: RealTree, folder: Path) -> None:
    """`RealTree.all_ways`, where the other end of eth0 is put under the bridge again each time."""
    tree.restoring = ["--external", "veth:eth0=out2@br0"]
    tree.goes_on()
    tree.carry_running(folder / "running")
    tree.carry(folder / "image")
    tree.restoring = ["--external", "veth:eth0=out3@br0"]
    tree.migrate()


@needs("redis-server=redis-server", "ip=iproute2")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_redis_with_clients_outside(
    launch: Callable[..., RealTree], workshop: Workshop, around: str, setting: object, tmp_path: Path
) -> None:
    with redis_and_clients(launch, workshop, around, setting) as (tree, clients):
        within(around, lambda: all_ways_connected(tree, tmp_path))
        clients.terminate()
        assert clients.wait(60) == 0
        all_is_well(tree.directory)
        tree.finish()


NGINX = """
daemon off;
user root;
worker_processes 2;
pid nginx.pid;
error_log error.log;
events { worker_connections 200; }
http {
  access_log off;
  keepalive_requests 1000000;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
  scgi_temp_path scgi;
  server { listen 80; root .; }
}
"""
#: ADDRESS COUNT NEWCOMERS: clients that compare what they get, until SIGTERM; newcomers connect for each page
GETTERS = r"""
import http.client, os, signal, sys, threading, time

address, lasting, newcomers = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
count = lasting + newcomers
wanted = open("page", "rb").read()
end = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: end.set())
done = [0] * count


def work(n):
    try:
        connection = http.client.HTTPConnection(address, 80)
        connection.connect()
        connection.auto_open = 0
        while not end.is_set():
            if n >= lasting:
                connection.close()
                connection.connect()
                time.sleep(0.005)
            connection.request("GET", "/page")
            answer = connection.getresponse()
            if answer.status != 200 or answer.read() != wanted or answer.will_close:
                raise OSError(f"{answer.status}, or another page, or the server closes")
            done[n] += 1
    except Exception as error:
        with open("wrong", "a") as file:
            print(f"client {n} after {done[n]} pages: {error!r}", file=file)


threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
for thread in threads:
    thread.start()
while not end.wait(0.02):
    with open(".pages", "w") as file:
        file.write(str(min(done)))
    os.replace(".pages", "pages")
for thread in threads:
    thread.join()
open("ended", "w").close()
"""


@needs("nginx=nginx-light", "wrk=wrk", "ip=iproute2")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_nginx_with_clients_outside(
    launch: Callable[..., RealTree], workshop: Workshop, around: str, setting: object, tmp_path: Path
) -> None:
    directory = workshop.directory()
    configuration = written(directory, "nginx.conf", NGINX)
    written(directory, "page", "".join(f"line {n} of a page\n" for n in range(10_000)))
    script = written(directory, "getters.py", GETTERS)
    with ExitStack() as stack:
        command = ["nginx", "-p", directory, "-c", configuration, "-e", "error.log"]
        tree = within(around, lambda: launch(setting, command, count_in("pages"), directory=directory))
        tree.wait("nginx has workers", lambda: len(tree.pids()) == 3)
        plug(around, tree)
        getters = outside(around, directory, sys.executable, script, THEIRS, "10", "2")
        load = outside(
            around, directory, "wrk", "-t1", "-c10", "-d600s", "--timeout", "60s", f"http://{THEIRS}/page"
        )
        for process in (getters, load):
            stack.callback(process.wait)
            stack.callback(process.kill)
        tree.wait(
            "every client is served",
            lambda: count_in("pages")(directory) > 2 or (directory / "wrong").exists(),
        )
        assert not (directory / "wrong").exists(), (directory / "wrong").read_text()
        within(around, lambda: all_ways_connected(tree, tmp_path))
        getters.terminate()
        assert getters.wait(60) == 0
        load.send_signal(signal.SIGINT)
        assert load.wait(60) == 0
    all_is_well(directory)
    said = (directory / "outside.log").read_text()
    assert re.search(r"\d+ requests in", said), said
    assert "Socket errors" not in said, said
    assert "Non-2xx" not in said, said
    workers = tree.pids()[1:]
    os.kill(tree.pid, signal.SIGTERM)
    assert not reap([tree.pid, *workers])
    errors = directory / "error.log"
    assert not [line for line in errors.read_text().splitlines() if re.search("emerg|alert|crit|error", line)]
