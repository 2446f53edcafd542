"""A family across user namespaces: parent, child one level below, grandchild two levels below, talking to each other.

The namespaces' maps are written by the parent of each; a pipe and a socket pair join the
levels; every process checks its own ids as it sees them from inside.
"""

import os
import socket

from support import libc, main, status

CLONE_NEWUSER, CLONE_NEWUTS = 0x10000000, 0x04000000
PR_SET_DUMPABLE = 4


def write_file(path, text):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read_file(path):
    with open(path) as file:
        return file.read()


def everything():
    return (
        os.getresuid(),
        os.getresgid(),
        os.getgroups(),
        [read_file(f"/proc/self/{name}").split() for name in ("uid_map", "gid_map", "setgroups")],
        [status(name) for name in ("CapEff", "CapBnd", "NSpid")],
        os.uname().nodename,
    )


def in_user_namespace(program, role, uid_map, gid_map, ids, body, setgroups="allow"):
    """A child in a new user namespace with these maps, which becomes `ids` and runs `body`."""
    read, write = os.pipe()
    back_read, back_write = os.pipe()

    def inside(child):
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWUTS):
            raise OSError("unshare")
        os.write(back_write, b"x")
        os.read(read, 1)
        for fd in (read, write, back_read, back_write):
            os.close(fd)
        os.setresgid(*[ids[1]] * 3)
        os.setresuid(*[ids[0]] * 3)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        body(child)

    # The maps are written between the child's two steps, so a helper waits for the first one.
    helper = os.fork()
    if helper == 0:
        os.read(back_read, 1)
        target = int(read_from(program, f"pid.{role}"))
        if setgroups == "deny":
            write_file(f"/proc/{target}/setgroups", "deny")
        write_file(f"/proc/{target}/uid_map", uid_map)
        write_file(f"/proc/{target}/gid_map", gid_map)
        os.write(write, b"x")
        os._exit(0)

    def announced(child):
        child.put(f"pid.{role}", str(os.getpid()))
        inside(child)

    pid = program.child(role, announced)
    for fd in (read, write, back_read, back_write):
        os.close(fd)
    if os.waitpid(helper, 0)[1]:
        raise RuntimeError(f"the maps of {role} could not be written")
    return pid


def read_from(program, name):
    program.wait_file(name)
    return program.take(name)


def less():
    libc.prctl(24, 12)  # a capability less in the bounding set, or no effective one at all
    libc.capset(b"\x22\x05\x08\x20\0\0\0\0", bytes(24))


def body(program):
    pipe_read, pipe_write = os.pipe()
    above, below = socket.socketpair()

    def grandchild(child):
        child.same("as seen from inside", everything, less)
        child.check(
            "socket pair", lambda: receive(below, above, b"from the top to the bottom"), lambda: below.recv(3)
        )
        os.write(pipe_write, b"from the bottom")

    def receive(reader, writer, expected):
        found = reader.recv(100)
        writer.send(found)
        return None if found == expected else f"{found!r}"

    def middle(child):
        in_user_namespace(child, "grandchild", "0 5 1\n3 7 2", "0 6 10", (0, 3), grandchild)
        libc.sethostname(b"middle", 6)
        child.same("as seen from inside", everything, less)

    above.send(b"from the top to the bottom")
    in_user_namespace(program, "middle", "0 10 30", "0 20 30", (1, 2), middle)
    in_user_namespace(
        program,
        "aside",
        "7 0 1",
        "9 0 1",
        (7, 9),
        lambda c: c.same("as seen from inside", everything, less),
        "deny",
    )

    def through_pipe():
        found = os.read(pipe_read, 100)
        os.write(pipe_write, found)
        return None if found == b"from the bottom" else f"{found!r}"

    program.check("pipe", through_pipe, lambda: os.read(pipe_read, 3))
    program.same("as seen from inside", everything, less)


main(body)
