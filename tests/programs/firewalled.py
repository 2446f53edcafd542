"""A network of its own with nftables rules: chains, sets with elements and timeouts, maps, counters, quotas, NAT.

Needs CAP_NET_ADMIN and CAP_SYS_ADMIN in its user namespace, and nft.
"""

import os
import re
import socket
import subprocess

from support import libc, main

CLONE_NEWNET = 0x40000000

RULES = """
table inet filter {
    comment "what # is not a comment"
    set blocked {
        type inet_service
        flags interval
        elements = { 1000, 1010-1019 }
    }
    set fading {
        type ipv4_addr
        flags timeout
        elements = { 10.0.0.1 timeout 1h, 10.0.0.2 timeout 2h comment "x y" }
    }
    set seen {
        type ipv4_addr . inet_service
        flags dynamic, timeout
        size 128
        timeout 1h
    }
    map verdicts {
        type inet_service : verdict
        elements = { 2000 : drop, 2001 : accept }
    }
    counter counted {
        packets 5 bytes 600
    }
    quota spent {
        over 100 mbytes used 12345 bytes
    }
    chain out {
        type filter hook output priority 0; policy accept;
        udp dport @blocked drop comment "a # b"
        udp dport vmap @verdicts
        meta skuid OWN udp dport 3000 drop
        meta skuid 4242 udp dport 3001 drop
        meta skgid { 4242, 5000-6000 } counter packets 9 bytes 99
        oif "wire" meta mark 0x12 accept
        udp dport 4000 counter name "counted" quota name "spent" update @seen { ip daddr . udp dport }
        ip daddr @fading ct state established,related drop
    }
}
table ip nat {
    chain there {
        type nat hook output priority -100;
        udp dport 5000 redirect to :5001
    }
}
table ip6 asleep {
    flags dormant
    chain in {
        type filter hook input priority 0; policy drop;
    }
}
table netdev early {
    chain in {
        type filter hook ingress device "wire" priority 0;
        meta mark set 5
    }
}
"""


def run(*words, **more):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **more)
    if done.returncode:
        raise OSError(f"{words}: {done.stderr}")
    return done.stdout


def ruleset():
    return re.sub(r"expires \w+", "expires", run("/usr/sbin/nft", "-n", "list", "ruleset"))


def passes(port):
    """Whether a datagram to a port of our own leaves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"x", ("127.0.0.1", port))
        except PermissionError:
            return False
    return True


def body(program):
    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")
    run("/usr/sbin/ip", "link", "set", "lo", "up")
    run("/usr/sbin/ip", "link", "add", "wire", "index", "70", "type", "veth", "peer", "name", "end")
    run("/usr/sbin/nft", "-f", "-", input=RULES.replace("OWN", str(os.getuid())))
    broken = []

    def spoil():
        broken.append(1)

    passes(4000)
    program.same("what nft says", lambda: (ruleset(), list(broken)), spoil)
    redirected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    redirected.bind(("127.0.0.1", 5001))
    redirected.settimeout(5)

    def try_ports():
        found = {port: passes(port) for port in (1000, 1009, 1015, 2000, 2001, 3000, 3001)}
        wanted = {1000: False, 1009: True, 1015: False, 2000: False, 2001: True, 3000: False, 3001: True}
        passes(5000)
        redirected.recv(10)
        return None if found == wanted and not broken else f"{found}"

    program.check("the rules are in force", try_ports, spoil)


main(body)
