"""What a process sees of the namespaces it is in: ids, maps, pids, names, mounts. Needs no privilege by itself."""

import contextlib
import ctypes
import os
import socket

from support import libc, main, status


def read_file(path):
    with open(path) as file:
        return file.read()


def ids():
    return (
        os.getresuid(),
        os.getresgid(),
        os.getgroups(),
        [status(f) for f in ("Uid", "Gid", "Groups", "CapEff")],
    )


def maps():
    return [read_file(f"/proc/self/{name}").split() for name in ("uid_map", "gid_map", "setgroups")]


def mounts():
    """Mounts by root, place, options and type: the ids of mounts and of devices are the kernel's."""
    lines = []
    for line in read_file("/proc/self/mountinfo").splitlines():
        head, tail = line.split(" - ", 1)
        fields = head.split()
        lines.append((fields[3], fields[4], fields[5], tail.split()[0]))
    return lines


def change_ids():
    """The other id that is mapped, or, with one only, none at all for the filesystem id's check."""
    if len(read_file("/proc/self/gid_map").split()) == 3 and os.getegid() != 0:
        os.setgid(os.getegid())
    libc.prctl(24, 12)  # one capability less in the bounding set
    header = ctypes.create_string_buffer(8)
    ctypes.memmove(header, b"\x22\x05\x08\x20", 4)
    libc.capset(header, bytes(24))


def body(program):
    broken = []
    program.same("ids", ids, change_ids)
    in_pid_namespace = os.getpid() == 1

    def numbers():
        return os.getpid(), os.getppid(), status("NSpid"), os.path.exists("/proc/1/stat")

    program.same("pids", lambda: (numbers(), list(broken)), lambda: broken.append(1))
    program.same("maps", lambda: (maps(), list(broken)), lambda: broken.append(1))
    program.same("mounts", lambda: (mounts(), list(broken)), lambda: broken.append(1))
    with contextlib.suppress(PermissionError):
        socket.sethostname("named-inside") if in_pid_namespace else None
    program.same("host name", lambda: (socket.gethostname(), list(broken)), lambda: broken.append(1))

    def child(inner):
        inner.same("ids", ids, change_ids)
        inner.same("pids", lambda: (numbers(), list(broken)), lambda: broken.append(1))

    program.child("child", child)
    program.same(
        "/proc",
        lambda: (
            sorted(int(x) for x in os.listdir("/proc") if x.isdigit()) if in_pid_namespace else 0,
            list(broken),
        ),
        lambda: broken.append(1),
    )


main(body)
