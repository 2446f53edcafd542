"""Mounts that show namespaces: namespace files, sysfs, cgroup hierarchies; and, where it may, an idmapped mount.

Some namespaces live by such a mount only. Needs CAP_SYS_ADMIN in its user namespace.
"""

import fcntl
import os
import socket
import struct

from support import DIRECTORY, call, libc, main, mount, syscall

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
BIND, REC, PRIVATE = 4096, 16384, 1 << 18
NS_GET_USERNS = 0xB701
MOUNT_SETATTR, OPEN_TREE, MOVE_MOUNT = 442, 428, 429


def read(path):
    with open(path) as file:
        return file.read().split()


def place(name):
    path = f"{DIRECTORY}/{name}"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    return path


def bind(pid, kind, name):
    path = place(name)
    mount(f"/proc/{pid}/ns/{kind}", path, None, BIND)
    return path


def leave_namespaces():
    """A child that makes namespaces, lets its parent bind their files, and ends; returns what was bound."""
    (told, tell), (go, let_go) = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:
        call(libc.unshare, CLONE_NEWUSER | CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWNS)
        libc.sethostname(b"nobody-is-here", 14)
        libc.prctl(4, 1, 0, 0, 0)
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    os.read(told, 1)
    first = read("/proc/self/uid_map")[0]
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/{helper}/{name}", "w") as file:
            file.write(f"3 {first} 1")
    bound = {kind: bind(helper, kind, f"left-{kind}") for kind in ("user", "uts", "net", "mnt")}
    os.write(let_go, b"x")
    os.waitpid(helper, 0)
    for fd in (told, tell, go, let_go):
        os.close(fd)
    return bound


def in_left(bound):
    """What a visitor finds in the namespaces that nobody is in."""
    reader, writer = os.pipe()
    visitor = os.fork()
    if visitor == 0:
        try:
            for kind, flag in (("user", CLONE_NEWUSER), ("uts", CLONE_NEWUTS), ("net", CLONE_NEWNET)):
                fd = os.open(bound[kind], os.O_RDONLY)
                call(libc.setns, fd, flag)
            devices = [name for _, name in socket.if_nameindex()]
            ids = [read(f"/proc/self/{name}") for name in ("uid_map", "gid_map")]
            os.write(writer, repr((socket.gethostname(), devices, ids)).encode())
        except OSError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(visitor, 0)
    text = os.read(reader, 4096)
    os.close(reader)
    return text


def same_file(one, other):
    return os.path.samestat(os.stat(one), os.stat(other))


def owner_is(path, wanted):
    fd = os.open(path, os.O_RDONLY)
    try:
        owner = fcntl.ioctl(fd, NS_GET_USERNS)
        found = os.path.samestat(os.fstat(owner), os.stat(wanted))
        os.close(owner)
    finally:
        os.close(fd)
    return found


def shown(point):
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    return [
        (words[3], words[5], words[words.index("-") + 1], words[-1].split(",")[-1])
        for words in lines
        if words[4] == point
    ]


def with_a_name(program):
    """A child in a mount and a pid namespace of its own, whose files its parent binds."""
    call(libc.unshare, CLONE_NEWNS)
    program.same(
        "child",
        lambda: [shown(f"{DIRECTORY}/child-mnt"), shown("/mnt")],
        lambda: mount("x", "/mnt", "tmpfs", 0),
    )


def idmapped(program):
    """A directory whose files belong to other ids in a mount; only root of the initial user namespace may."""
    if read("/proc/self/uid_map") != ["0", "0", "4294967295"]:
        return
    source, point = f"{DIRECTORY}/mapped-source", f"{DIRECTORY}/mapped"
    os.mkdir(source)
    os.mkdir(point)
    for number in (0, 5):
        os.close(os.open(f"{source}/{number}", os.O_CREAT | os.O_WRONLY, 0o644))
        os.chown(f"{source}/{number}", number, number + 1)
    (told, tell), (go, let_go) = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:
        call(libc.unshare, CLONE_NEWUSER)
        os.write(tell, b"x")
        os.read(go, 1)
        os._exit(0)
    os.read(told, 1)
    for name, text in (("uid_map", "0 70000 3\n5 90000 1"), ("gid_map", "0 80000 10")):
        with open(f"/proc/{helper}/{name}", "w") as file:
            file.write(text)
    userns = os.open(f"/proc/{helper}/ns/user", os.O_RDONLY)
    os.write(let_go, b"x")
    os.waitpid(helper, 0)
    tree = syscall(OPEN_TREE, -100, source.encode(), 1 | os.O_CLOEXEC)
    syscall(MOUNT_SETATTR, tree, b"", 0x1000, struct.pack("<4Q", 0x100000, 0, 0, userns), 32)
    syscall(MOVE_MOUNT, tree, b"", -100, point.encode(), 4)
    for fd in (tree, userns, told, tell, go, let_go):
        os.close(fd)

    def owners():
        found = [os.stat(f"{point}/{number}") for number in (0, 5)]
        return [(s.st_uid, s.st_gid) for s in found], shown(point)

    program.same("idmapped", owners, lambda: call(libc.umount2, point.encode(), 2))

    def deeper(inner):
        """The same mount, seen from a namespace that a user namespace owns, two levels down."""
        for _ in range(2):
            call(libc.unshare, CLONE_NEWUSER | CLONE_NEWNS)
            for name, text in (("setgroups", "deny"), ("gid_map", "0 0 1"), ("uid_map", "0 0 1")):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        inner.same("idmapped below", owners, lambda: mount("x", point, "tmpfs", 0))

    program.child("deeper", deeper)


def body(program):
    # the file of a mount namespace can be bound only in one with a lower number, and the kernel numbers by processor
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    call(libc.unshare, CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWCGROUP)
    mount(None, "/", None, REC | PRIVATE)
    own = {kind: bind("self", kind, f"own-{kind}") for kind in ("user", "net", "uts", "cgroup", "ipc", "pid")}
    left = leave_namespaces()
    again = place("again")
    mount(left["uts"], again, None, BIND)
    os.mkdir(f"{DIRECTORY}/sys")
    mount("sysfs", f"{DIRECTORY}/sys", "sysfs", 0)
    hierarchies = {"unified": ("cgroup2", None)}
    if any(line.split(":")[1] == "cpu" for line in read("/proc/self/cgroup")):  # a host with version 1
        hierarchies["processors"] = ("cgroup", "cpu")
    for name, (kind, options) in hierarchies.items():
        os.makedirs(f"{DIRECTORY}/{name}")
        mount("none", f"{DIRECTORY}/{name}", kind, 0, options)
    pid = program.child("child", with_a_name)
    of_child = bind(pid, "mnt", "child-mnt")
    idmapped(program)

    def take_away(*paths):
        for path in paths:
            call(libc.umount2, path.encode(), 2)

    def files():
        found = [(kind, same_file(path, f"/proc/self/ns/{kind}")) for kind, path in own.items()]
        found.append(("child", same_file(of_child, f"/proc/{pid}/ns/mnt")))
        found.append(("again", same_file(again, left["uts"]), same_file(again, own["uts"])))
        found += [(kind, owner_is(left[kind], left["user"])) for kind in ("uts", "net")]
        return [*found, owner_is(left["user"], own["user"])]

    program.same("namespace files", files, lambda: take_away(*own.values(), again, of_child))
    program.same(
        "namespaces that nobody is in", lambda: in_left(left), lambda: take_away(left["uts"], left["user"])
    )
    program.same(
        "sysfs",
        lambda: (shown(f"{DIRECTORY}/sys"), sorted(os.listdir(f"{DIRECTORY}/sys/class/net"))),
        lambda: take_away(f"{DIRECTORY}/sys"),
    )
    program.same(
        "cgroup hierarchies",
        lambda: [
            (shown(f"{DIRECTORY}/{name}"), "cgroup.procs" in os.listdir(f"{DIRECTORY}/{name}"))
            for name in hierarchies
        ],
        lambda: take_away(f"{DIRECTORY}/unified"),
    )


main(body)
