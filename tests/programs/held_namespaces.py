"""Descriptors of namespaces: of the own ones, of a child's, and of one that nobody is in any more.

Needs CAP_SYS_ADMIN in its user namespace.
"""

import fcntl
import os
import socket

from support import libc, main

CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x04000000, 0x08000000, 0x10000000
NS_GET_USERNS = 0xB701
KINDS = ("user", "pid", "uts", "ipc", "time", "cgroup", "mnt")


def call(function, *args):
    if function(*args) == -1:
        raise OSError(f"{function.__name__}{args}")


def namespace(pid, kind):
    return os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def same(fd, other):
    return os.path.samestat(os.fstat(fd), os.stat(other))


def body(program):
    broken = []

    def spoil():
        broken.append(1)

    own = {kind: namespace("self", kind) for kind in KINDS}
    (told, tell), (go, let_go) = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:  # makes namespaces for others to hold, and ends
        call(libc.unshare, CLONE_NEWUSER | CLONE_NEWUTS)
        libc.sethostname(b"nobody-is-here", 14)
        libc.prctl(4, 1, 0, 0, 0)
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    os.read(told, 1)
    held = {kind: namespace(helper, kind) for kind in ("user", "uts")}
    os.write(let_go, b"x")
    os.waitpid(helper, 0)

    def child(inner):
        call(libc.unshare, CLONE_NEWUTS | CLONE_NEWIPC)
        libc.sethostname(b"the-child", 9)
        inner.same("host name", lambda: (socket.gethostname(), list(broken)), spoil)

    pid = program.child("child", child)
    of_child = {kind: namespace(pid, kind) for kind in ("uts", "ipc", "user")}

    def look():
        found = [(kind, same(fd, f"/proc/self/ns/{kind}")) for kind, fd in own.items()]
        found += [(kind, same(fd, f"/proc/{pid}/ns/{kind}")) for kind, fd in of_child.items()]
        found += [(kind, same(fd, f"/proc/self/ns/{kind}")) for kind, fd in held.items()]
        owner = fcntl.ioctl(held["uts"], NS_GET_USERNS)
        found.append(("owner", same(owner, f"/proc/self/fd/{held['user']}")))
        os.close(owner)
        visitor_read, visitor_write = os.pipe()
        visitor = os.fork()
        if visitor == 0:  # joins what nobody is in
            try:
                call(libc.setns, held["user"], CLONE_NEWUSER)
                call(libc.setns, held["uts"], CLONE_NEWUTS)
                os.write(visitor_write, socket.gethostname().encode())
            except OSError as error:
                os.write(visitor_write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(visitor, 0)
        found.append(os.read(visitor_read, 100))
        os.close(visitor_read)
        os.close(visitor_write)
        return found, list(broken)

    program.same("descriptors of namespaces", look, spoil)


main(body)
