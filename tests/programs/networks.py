"""Networks of its own: two of them, joined by a veth pair, with a bridge, addresses, routes, rules, sysctls, sockets.

Needs CAP_NET_ADMIN and CAP_SYS_ADMIN in its user namespace. The child lives in the second network; they talk by UDP.
"""

import json
import os
import socket
import subprocess
import time

from support import libc, main

CLONE_NEWNET = 0x40000000


def ip(*words):
    done = subprocess.run(["/usr/sbin/ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr}")
    return done.stdout


def described():
    """What `ip` says, without counters and times."""
    links = json.loads(ip("-j", "-d", "link", "show"))
    for link in links:
        for name in ("link_netnsid", "link_index", "linkinfo", "stats", "operstate", "netns-immutable"):
            link.pop(name, None)
    addresses = json.loads(ip("-j", "address", "show"))
    found = [
        (a["ifname"], i["family"], i["local"], i["prefixlen"], i.get("scope"), i.get("label"))
        for a in addresses
        for i in a["addr_info"]
    ]
    # whether the other end of a cable is up is noticed a moment later
    routes = [ip("route", "show", "table", "all"), ip("-6", "route", "show", "table", "all")]
    rules = [ip("rule", "show"), ip("-6", "rule", "show")]
    return (
        links,
        sorted(found),
        [sorted(r.replace(" linkdown", "").splitlines()) for r in routes],
        rules,
        ip("neigh", "show", "nud", "permanent"),
    )


def settled(found):
    """Whether every IPv6 address is in use: has a route of its own."""
    _, addresses, (_, routes), *_ = found
    return all(
        any(route.startswith(f"local {address} ") for route in routes)
        for _, family, address, *_ in addresses
        if family == "inet6"
    )


def wait_and(act):
    time.sleep(0.1)
    return act()


def sysctl(name, value=None):
    path = f"/proc/sys/net/{name}"
    with open(path, "w" if value is not None else "r") as file:
        return file.write(value) if value is not None else file.read().strip()


def prepare():
    for name in ("all", "default"):
        sysctl(
            f"ipv6/conf/{name}/accept_dad", "0"
        )  # else addresses become usable a second after they are there
    ip("link", "set", "lo", "up")


def body(program):
    broken = []

    def spoil():
        broken.append(1)

    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")
    prepare()
    ready, go = os.pipe(), os.pipe()

    def watched(member):
        # link-local addresses and their routes come a moment after a device is up, here and after a restore
        before = described()
        while before != (before := wait_and(described)) or not settled(before):
            pass

        def run():
            for _ in range(30):
                now = described()
                if now == before and not broken:
                    return None
                wait_and(described)
            return f"was {before!r}, is {now!r}, spoilt {broken}"

        member.check("what ip says", run, spoil)

    def child(inner):
        if libc.unshare(CLONE_NEWNET):
            raise OSError("unshare")
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        for fd in (*ready, *go):
            os.close(fd)
        prepare()
        ip("address", "add", "10.9.0.2/24", "dev", "end2")
        ip("link", "set", "end2", "up")
        ip("route", "add", "default", "via", "10.9.0.1")
        echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        echo.bind(("10.9.0.2", 7))
        listener = socket.create_server(("127.0.0.1", 80))
        watched(inner)

        def answer():
            client = socket.create_connection(("127.0.0.1", 80), timeout=5)
            server, _ = listener.accept()
            server.close()
            client.close()
            echo.settimeout(5)
            text, sender = echo.recvfrom(100)
            echo.sendto(text[::-1], sender)
            return "spoilt" if broken else None

        inner.check("sockets of the child", answer, spoil)

    # the child waits for its end of the pair before it goes on, so it is not waited for here
    pid = os.fork()
    if pid == 0:
        from support import Program

        inner = Program("child", program.directory)
        child(inner)
        inner.serve()
        os._exit(0)
    program.answering.append(pid)
    os.read(ready[0], 1)
    ip(
        "link",
        "add",
        "name",
        "end1",
        "index",
        "70",
        "type",
        "veth",
        "peer",
        "name",
        "end2",
        "netns",
        str(pid),
    )
    ip(
        "link",
        "add",
        "bridge",
        "address",
        "02:00:00:00:00:07",
        "mtu",
        "1400",
        "type",
        "bridge",
        "forward_delay",
        "500",
    )
    try:
        ip("link", "add", "dummy", "type", "dummy")
    except OSError:  # a kernel without that module
        ip("link", "add", "dummy", "type", "veth", "peer", "name", "other")
    ip("link", "set", "end1", "master", "bridge")
    for name in ("end1", "bridge", "dummy"):
        ip("link", "set", name, "up")
    ip("link", "set", "dummy", "alias", "for nothing")
    ip("address", "add", "10.9.0.1/24", "dev", "bridge")
    ip("address", "add", "2001:db8::1/64", "dev", "dummy", "nodad")
    ip("address", "add", "127.0.0.7/32", "dev", "lo", "label", "lo:seven")
    ip("route", "add", "192.0.2.0/24", "via", "10.9.0.2", "table", "77", "metric", "5")
    ip("rule", "add", "from", "10.9.0.9", "table", "77")
    ip("rule", "add", "uidrange", "0-0", "table", "78")
    ip("-6", "rule", "add", "uidrange", "0-0", "to", "2001:db8::/32", "table", "79")
    ip("neigh", "add", "10.9.0.77", "lladdr", "02:00:00:00:00:77", "dev", "bridge")
    sysctl("ipv4/ip_forward", "1")
    sysctl("ipv4/conf/dummy/rp_filter", "2")
    sysctl("ipv4/ip_unprivileged_port_start", "80")
    os.write(go[1], b"x")
    for fd in (*ready, *go):
        os.close(fd)
    caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    caller.bind(("10.9.0.1", 0))
    name = socket.socket(socket.AF_UNIX)
    name.bind("\0abstract-in-a-network")
    name.listen()
    program.wait_file("ready.child")
    watched(program)
    names = (
        "ipv4/ip_forward",
        "ipv4/conf/dummy/rp_filter",
        "ipv4/ip_unprivileged_port_start",
        "ipv4/conf/lo/rp_filter",
    )
    program.same("sysctls", lambda: ([sysctl(name) for name in names], list(broken)), spoil)

    def talk():
        caller.settimeout(5)
        caller.sendto(b"forwards", ("10.9.0.2", 7))
        found = caller.recv(100)
        client = socket.socket(socket.AF_UNIX)
        client.connect("\0abstract-in-a-network")
        client.close()
        name.accept()[0].close()
        return None if found == b"sdrawrof" and not broken else f"{found!r}"

    program.check("the networks are joined", talk, spoil)


main(body)
