"""A task in a user namespace that carries ids from outside its maps: it entered before they were written.

Needs root outside of the user namespace it makes.
"""

import os

from support import libc, main, status

CLONE_NEWUSER = 0x10000000
OUTSIDE_UID, OUTSIDE_GID, OUTSIDE_GROUP = 91, 92, 93


def write_file(path, text):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def body(program):
    def everything():
        return os.getresuid(), os.getresgid(), os.getgroups(), [status(f) for f in ("Uid", "Gid", "CapEff")]

    def spoil():
        header = b"\x22\x05\x08\x20\0\0\0\0"
        libc.capset(header, bytes(24))

    (told, tell), (go, let_go) = os.pipe(), os.pipe()

    def inside(child):
        os.setgroups([OUTSIDE_GROUP])
        os.setresgid(*[OUTSIDE_GID] * 3)
        libc.prctl(8, 1, 0, 0, 0)
        os.setresuid(*[OUTSIDE_UID] * 3)
        if libc.unshare(CLONE_NEWUSER):
            raise OSError("unshare")
        libc.prctl(4, 1, 0, 0, 0)
        os.write(tell, os.getpid().to_bytes(4, "little"))
        os.read(go, 1)
        child.same("ids that are not mapped here", everything, spoil)

    helper = os.fork()
    if helper == 0:
        pid = int.from_bytes(os.read(told, 4), "little")
        write_file(f"/proc/{pid}/uid_map", "0 10 50")
        write_file(f"/proc/{pid}/gid_map", "0 20 50")
        os.write(let_go, b"x")
        os._exit(0)
    program.child("inside", inside)
    if os.waitpid(helper, 0)[1]:
        raise RuntimeError("the maps could not be written")
    for fd in (told, tell, go, let_go):
        os.close(fd)
    program.same("own ids", everything, spoil)


main(body)
