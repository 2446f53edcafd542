"""A tree of any topology, from a description: who unshares what, when, with which maps, and forks whom before or after.

Called with ``DIRECTORY STEPS-AS-JSON``; without steps it makes a small one. Steps are lists, done in order by one
process:

* ``["user", uid_lines, gid_lines, setgroups]``: a new user namespace; lines as text, or null for a map that stays
  unwritten. A helper that stays outside writes them, and then the process takes the first ids of its maps if its own
  are not mapped. With ``"around"`` instead of ``"user"`` it keeps them.
* ``["ns", [kind...]]``: unshare uts, ipc, mnt, cgroup, time or pid (for children).
* ``["fork", name, steps]``: a child that does `steps`; it answers under `name`.
* ``["enter", name, [kind...]]``: join the namespaces of the process of that name, as they are in this order.
* ``["ids", uid, gid, groups]``: real, effective and saved ids, keeping all capabilities; null leaves them.
* ``["drop"]``: no capability any more. ``["bound", n]``: one less in the bounding set. ``["securebits", bits]``.
* ``["ambient", n]``: an inheritable and ambient capability. ``["nnp"]``: no_new_privs.
* ``["pivot"]``: a root of its own, with what is needed of the old one. ``["proc"]``: mount /proc.
* ``["hostname", text]``. ``["file", name]``: a file that the process owns.
* ``["setsid"]``, ``["setpgid"]``, ``["thread"]``, ``["zombie"]``.

Every process then says what it sees of itself from inside, and must see the same ever after.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading

from support import DIRECTORY, libc, main, prctl, status, syscall

FLAGS = {
    "uts": 0x04000000, "ipc": 0x08000000, "mnt": 0x00020000, "cgroup": 0x02000000, "time": 0x80, "pid": 0x20000000,
    "user": 0x10000000, "net": 0x40000000,
}  # fmt: skip
CAPSET = 126
OVERFLOW = 65534
SMALL = [
    ["fork", "above", []],
    ["user", "0 10 30", "0 20 30", "allow"],
    ["fork", "inside", [["ids", 3, 4, [5]]]],
]


def call(function, *args):
    if function(*args) == -1:
        raise OSError(ctypes.get_errno(), f"{function.__name__}{args}")


def put(path, text):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read(path):
    with open(path) as file:
        return file.read()


def owner(path):
    found = os.stat(path)
    return found.st_uid, found.st_gid


def unshare_user(uid_lines, gid_lines, setgroups, keep):
    target = os.readlink("/proc/self")
    go, let_go = os.pipe()
    helper = os.fork()
    if helper == 0:
        code = 1
        try:
            os.read(go, 1)
            if setgroups == "deny":
                put(f"/proc/{target}/setgroups", "deny")
            for name, lines in (("uid_map", uid_lines), ("gid_map", gid_lines)):
                if lines is not None:
                    put(f"/proc/{target}/{name}", lines)
            code = 0
        except OSError as error:
            print(target, uid_lines, gid_lines, error, file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    call(libc.unshare, FLAGS["user"])
    prctl(4, 1)
    os.write(let_go, b"x")
    os.close(go)
    os.close(let_go)
    if os.waitpid(helper, 0)[1]:
        raise RuntimeError("the maps could not be written")
    if not keep and uid_lines and gid_lines:
        uid, gid = (int(lines.split()[0]) for lines in (uid_lines, gid_lines))
        set_ids(uid if os.getuid() == OVERFLOW else None, gid if os.getgid() == OVERFLOW else None, None)


def set_ids(uid, gid, groups):
    prctl(28, 1 << 2)
    if groups is not None:
        os.setgroups(groups)
    if gid is not None:
        os.setresgid(gid, gid, gid)
    if uid is not None:
        os.setresuid(uid, uid, uid)
    prctl(28, 0)
    prctl(4, 1)


def capset(effective, permitted, inheritable):
    words = [(n >> shift) & 0xFFFFFFFF for shift in (0, 32) for n in (effective, permitted, inheritable)]
    syscall(CAPSET, ctypes.create_string_buffer(b"\x22\x05\x08\x20\0\0\0\0"), (ctypes.c_uint32 * 6)(*words))


def pivot(program):
    """A new root with /usr, /etc, /dev, /proc and the directory of the tests; everything is opened anew in it."""
    root = f"{DIRECTORY}/root.{program.role}"
    os.mkdir(root)
    bind, recursive = 4096, 16384
    call(libc.mount, root.encode(), root.encode(), None, bind, None)
    for name in ("/usr", "/etc", "/dev", "/proc", os.path.dirname(os.path.dirname(sys.argv[0]))):
        os.makedirs(root + name)
        call(libc.mount, name.encode(), (root + name).encode(), None, bind | recursive, None)
    for name in ("bin", "sbin", "lib", "lib64"):
        os.symlink(f"usr/{name}", f"{root}/{name}")
    os.chdir(root)
    syscall(155, b".", b".")
    call(libc.umount2, b".", 2)
    os.chdir("/")
    os.close(program.directory)
    program.directory = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for fd, path, flags in (
        (0, "/dev/null", os.O_RDONLY),
        (1, f"{DIRECTORY}/log", os.O_WRONLY | os.O_APPEND),
    ):
        opened = os.open(path, flags)
        os.dup2(opened, fd)
        os.close(opened)
    os.dup2(1, 2)


def do(program, steps, files):
    for what, *args in steps:
        if what in {"user", "around"}:
            unshare_user(*args, what == "around")
        elif what == "ns":
            for kind in args[0]:
                call(libc.unshare, FLAGS[kind])
                if kind == "mnt":
                    call(libc.mount, None, b"/", None, 0x44000, None)
        elif what == "fork":
            name, inner = args
            program.child(name, lambda child, inner=inner: play(child, inner))
        elif what == "enter":
            name, kinds = args
            pid = program.take(f"pid.{name}")
            opened = [(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY), kind) for kind in kinds]
            for fd, kind in opened:
                call(libc.setns, fd, FLAGS[kind])
                os.close(fd)
            prctl(4, 1)
        elif what == "ids":
            set_ids(*args)
        elif what == "drop":
            capset(0, 0, 0)
        elif what == "bound":
            prctl(24, args[0])
        elif what == "securebits":
            prctl(28, args[0])
        elif what == "ambient":
            every = int(status("CapPrm"), 16)
            capset(every, every, 1 << args[0])
            prctl(47, 2, args[0])
        elif what == "nnp":
            prctl(38, 1)
        elif what == "proc":
            call(libc.mount, b"proc", b"/proc", b"proc", 14, None)
        elif what == "pivot":
            pivot(program)
        elif what == "hostname":
            socket.sethostname(args[0])
        elif what == "file":
            fd = os.open(args[0], os.O_CREAT | os.O_WRONLY, 0o666, dir_fd=program.directory)
            os.close(fd)
            files.append(args[0])
        elif what == "setsid":
            os.setsid()
        elif what == "setpgid":
            os.setpgid(0, 0)
        elif what == "thread":
            threading.Thread(target=signal.pause, daemon=True).start()
        elif what == "zombie":
            child = os.fork()
            if child == 0:
                os._exit(7)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        else:
            raise ValueError(what)


def play(program, steps):
    files = []
    broken = []
    program.put(f"pid.{program.role}", os.readlink("/proc/self"))
    do(program, steps, files)

    def everything():
        return (
            [
                read(f"/proc/self/{name}").split()
                for name in ("uid_map", "gid_map", "projid_map", "setgroups")
            ],
            (os.getresuid(), os.getresgid(), os.getgroups()),
            [status(f"Cap{name}") for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")],
            (prctl(27), prctl(39), status("Uid"), status("Gid"), status("NSpid"), status("NSsid")),
            (os.getpid(), os.getppid() if program.role != "main" else 0, os.getpgrp(), os.getsid(0)),
            [owner(path) for path in ("/", "/etc/passwd", "/proc/self", "/proc/self/ns")],
            [(name, os.stat(name, dir_fd=program.directory).st_uid) for name in files],
            socket.gethostname(),
            read("/proc/self/cgroup").split(),
            sorted(len(os.listdir("/proc/self/task")) for _ in "1"),
            list(broken),
        )

    program.same("everything", everything, lambda: broken.append(1))


main(lambda program: play(program, json.loads(sys.argv[2]) if len(sys.argv) > 2 else SMALL))
