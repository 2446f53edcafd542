"""Puts a program where a test wants it: ids, user namespaces, other namespaces; then executes it.

Run as a script: ``starter.py SETTING-AS-JSON PROGRAM ARG...``. Standard library only.

The setting: ``{"levels": [[uid_lines, gid_lines, setgroups, ids], ...], "kinds": flags, "chain": bool,
"host_ids": [uid, gid] or null}``. `host_ids` are taken first: a plain user then makes the namespaces.
Each level is a user namespace inside the one before: the lines of its maps relative to
its parent, ``"allow"`` or ``"deny"``, and the (uid, gid) that the process takes inside.
The last level also gets the namespaces of `kinds` (CLONE_NEW* bits), with a /proc of
its own where it has both a pid and a mount namespace. With ``chain`` one process stays at
each level and waits for the next one (a tree across levels); without, only the last one is there.

The maps of a level are written by a helper that stays in its parent namespace, where it has
all capabilities; nothing of it is left when the program runs.
"""

import ctypes
import json
import os
import signal
import sys

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x20000, 0x10000000, 0x20000000
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x4000, 0x40000, 2, 4, 8
libc = ctypes.CDLL(None, use_errno=True)


def call(function, *args):
    if function(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{function.__name__}: {os.strerror(code)}")


def write(path, text):
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())  # a plain write: buffered files hide EPERM until they are closed
    finally:
        os.close(fd)


def enter_user_namespace(uid_lines, gid_lines, setgroups, ids):
    """unshare(CLONE_NEWUSER), maps written from outside, then the ids inside."""
    target = os.getpid()
    go_read, go_write = os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go_write)
        os.read(go_read, 1)
        if setgroups == "deny":
            write(f"/proc/{target}/setgroups", "deny")
        write(f"/proc/{target}/uid_map", "\n".join(uid_lines))
        write(f"/proc/{target}/gid_map", "\n".join(gid_lines))
        os._exit(0)
    os.close(go_read)
    call(libc.unshare, CLONE_NEWUSER)
    os.write(go_write, b"x")
    os.close(go_write)
    if os.waitpid(helper, 0)[1] != 0:
        raise RuntimeError("the helper could not write the maps")
    uid, gid = ids
    if setgroups != "deny":
        os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # Changing ids made this process undumpable: its /proc files, the maps of the next level too, are host root's.
    call(libc.prctl, 4, 1, 0, 0, 0)


def stay_parent():
    """Fork; the parent waits for the child and ends with its status, the child returns."""
    child = os.fork()
    if child == 0:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def main():
    setting = json.loads(sys.argv[1])
    os.closerange(3, 1 << 20)  # what the test's own surroundings left open is no part of the program
    if os.getsid(0) != os.getpid():
        os.setsid()
    if setting["host_ids"]:
        uid, gid = setting["host_ids"]
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        call(libc.prctl, 4, 1, 0, 0, 0)
    for number, level in enumerate(setting["levels"]):
        if setting["chain"] and number:
            stay_parent()
        enter_user_namespace(*level)
    kinds = setting["kinds"]
    if kinds:
        call(libc.unshare, kinds)
        if kinds & CLONE_NEWPID:
            stay_parent()
        if kinds & CLONE_NEWNS:
            call(libc.mount, None, b"/", None, MS_REC | MS_PRIVATE, None)
            if kinds & CLONE_NEWPID:
                call(libc.mount, b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    os.execv(sys.argv[2], sys.argv[2:])


main()
