"""Descriptors of namespaces: of the own ones, of a child's, and of one that nobody is in any more.

Needs CAP_SYS_ADMIN in its user namespace.
"""

import fcntl
import os
import socket

from support import call, libc, main

CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER = 0x04000000, 0x08000000, 0x10000000
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWNET = 0x00020000, 0x02000000, 0x40000000
#: of the namespaces that nobody is in
HELD = {
    "user": CLONE_NEWUSER, "uts": CLONE_NEWUTS, "mnt": CLONE_NEWNS, "cgroup": CLONE_NEWCGROUP, "net": CLONE_NEWNET,
}  # fmt: skip
NS_GET_USERNS = 0xB701
KINDS = ("user", "pid", "uts", "ipc", "time", "cgroup", "mnt")


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
        maps = {"setgroups": "deny", "gid_map": f"0 {os.getegid()} 1", "uid_map": f"0 {os.geteuid()} 1"}
        for kind, flag in HELD.items():
            call(libc.unshare, flag)
            for name, text in maps.items() if kind == "user" else ():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        libc.sethostname(b"nobody-is-here", 14)
        call(libc.mount, b"held", b"/mnt", b"tmpfs", 0, None)
        with open("/mnt/file", "w") as file:
            file.write("only to be seen there")
        libc.prctl(4, 1, 0, 0, 0)
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    os.read(told, 1)
    held = {kind: namespace(helper, kind) for kind in HELD}
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
                for kind, flag in HELD.items():
                    call(libc.setns, held[kind], flag)
                with open("/mnt/file") as file, open("/proc/self/cgroup") as places:
                    cgroups = {line.rpartition(":")[2] for line in places}
                    names = [name for _, name in socket.if_nameindex()]
                    said = socket.gethostname(), file.read(), cgroups, names
                os.write(visitor_write, repr(said).encode())
            except OSError as error:
                os.write(visitor_write, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(visitor, 0)
        found.append(os.read(visitor_read, 1000))
        os.close(visitor_read)
        os.close(visitor_write)
        return found, list(broken)

    program.same("descriptors of namespaces", look, spoil)


main(body)
