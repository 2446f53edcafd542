"""Two networks of its own, one for each process; what connects them is made by whoever is outside."""

from support import libc, main

CLONE_NEWNET = 0x40000000
SYSCTL = "/proc/sys/net/ipv4/tcp_fin_timeout"


def write(value):
    with open(SYSCTL, "w") as file:
        file.write(value)


def read():
    with open(SYSCTL) as file:
        return file.read()


def own_network(program, value):
    if libc.unshare(CLONE_NEWNET):
        raise OSError("unshare")
    write(value)
    program.same("a sysctl", read, lambda: write("9"))


def body(program):
    own_network(program, "41")
    program.child("child", lambda child: own_network(child, "42"))


main(body)
