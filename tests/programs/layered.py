"""Two networks of its own, with devices that lie on others: in the same network, and in the other one.

Needs CAP_NET_ADMIN and CAP_SYS_ADMIN in its user namespace.
"""

import json
import os
import subprocess
import time

from support import libc, main

CLONE_NEWNET = 0x40000000
#: the first one is born before what it lies on is called so: its index is lower
DEVICES = """
link add name lower index 80 address 02:00:00:00:00:80 type veth peer name other index 81
link add link lower name over index 5 address 02:00:00:00:00:05 type macvlan mode vepa
link add name third index 82 address 02:00:00:00:00:82 type veth peer name fourth index 83
link add link third name through index 8 type macvlan mode passthru nopromisc
link add link lower name picky index 6 address 02:00:00:00:00:06 type macvlan mode source
link set link lower dev picky type macvlan macaddr add 02:00:00:00:00:66
link set link lower dev picky type macvlan macaddr add 02:00:00:00:00:67
link add link other name tap index 7 address 02:00:00:00:00:07 type macvtap mode bridge bcqueuelen 500
link set other up
link set lower up
link set over up
address add 10.7.0.1/24 dev over
link add name far-away index 9 address 02:00:00:00:00:09 type vxlan id 42 local 10.0.0.1 remote 10.0.0.2 dstport 4789 \
nolearning ttl 5
link add name many index 10 type vxlan id 43 dev lower group 239.1.1.1 dstport 4790 gbp ttl inherit port 7000 8000
link set far-away up
link set many up
link add name bridge index 11 type bridge
link set fourth master bridge
link add name fifth index 84 type veth peer name sixth index 85
link set fifth master bridge
link set bridge type bridge mcast_querier 1 mcast_query_interval 7000 mcast_igmp_version 3 no_linklocal_learn 1
link set bridge type bridge group_fwd_mask 8 mcast_router 2 mcast_hash_max 1024
link set fourth type bridge_slave cost 9 priority 5 hairpin on isolated on learning off mcast_flood off
link set fourth type bridge_slave backup_port fifth mcast_router 0 neigh_suppress on
"""


FORWARDING = """
append 00:00:00:00:00:00 dev far-away dst 10.0.0.3
add 02:00:00:00:02:09 dev far-away dst 10.0.0.4 port 5000
add 02:00:00:00:01:0a dev fourth master static sticky
add 02:00:00:00:01:0c dev fourth master local
add 02:00:00:00:01:0d dev bridge self local
"""


def run(tool, *words):
    done = subprocess.run([f"/usr/sbin/{tool}", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{tool} {' '.join(words)}: {done.stderr}")
    return done.stdout


def ip(*words):
    return run("ip", *words)


def described():
    """What `ip` says, without counters and times."""
    links = json.loads(ip("-j", "-d", "link", "show"))
    for link in links:
        for name in ("link_netnsid", "operstate", "netns-immutable"):
            link.pop(name, None)
        info = link.get("linkinfo", {})
        for data in (info.get("info_data", {}), info.get("info_slave_data", {})):
            for name in [name for name in data if name.endswith(("_timer", "_id", "_change", "_detected"))]:
                del data[name]  # of the spanning tree, at the moment
    entries = run("bridge", "fdb", "show").splitlines()
    told = [
        line for line in entries if " dst " in line or " static" in line or line.startswith("02:00:00:00:01:")
    ]
    return [*links, {"ifname": "forwarding", **dict.fromkeys(told, "there")}]


def wait_and_describe():
    time.sleep(0.1)
    return described()


def own_network():
    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")


def body(program):
    broken = []

    def watch(member):
        before = described()
        while before != (before := wait_and_describe()):  # the kernel notices later what a carrier is
            pass

        def differs():
            for _ in range(30):
                found = look()
                if found is None or broken:
                    return found
                time.sleep(0.1)
            return found

        def look():
            now = described()
            found = [
                (old["ifname"], name, old.get(name), new.get(name))
                for old, new in zip(before, now, strict=True)
                for name in old.keys() | new.keys()
                if old.get(name) != new.get(name)
            ]
            return f"{found} spoilt {broken}" if found or broken else None

        member.check("what ip says", differs, lambda: broken.append(1))

    own_network()
    for line in DEVICES.strip().splitlines():
        ip(*line.split())
    for line in FORWARDING.strip().splitlines():
        run("bridge", "fdb", *line.split())
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        from support import Program

        inner = Program("child", program.directory)
        own_network()
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        for fd in (*ready, *go):
            os.close(fd)
        watch(inner)
        inner.serve()
        os._exit(0)
    program.answering.append(pid)
    os.read(ready[0], 1)
    for words in (
        f"link add link other name far index 90 address 02:00:00:00:00:90 netns {pid} type macvlan mode bridge",
        f"link add name afar index 91 netns {pid} type vxlan id 44 dstport 4791 remote 10.0.0.9",
    ):
        ip(*words.split())
    os.write(go[1], b"x")
    for fd in (*ready, *go):
        os.close(fd)
    program.wait_file("ready.child")
    watch(program)


main(body)
