"""tmpfs with everything that one can hold, in a mount namespace of its own; a child has a copy of the namespace.

Needs CAP_SYS_ADMIN in its user namespace.
"""

import errno
import mmap
import os
import socket
import stat

from support import DIRECTORY, call, libc, main, mount

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC = 1, 2, 4, 32, 4096, 16384
PRIVATE, SHARED = 1 << 18, 1 << 20
POINT = f"{DIRECTORY}/full"
ACL_ACCESS = "system.posix_acl_access"


def refused(act):
    """The error that `act()` ends with."""
    try:
        act()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "nothing refused it"


def attributes(path):
    found = {}
    for name in os.listxattr(path, follow_symlinks=False):
        found[name] = os.getxattr(path, name, follow_symlinks=False)
    return found


def listing(top):
    """Everything below a directory that stat and readlink tell, and which names are one file."""
    found, first = {}, {}
    for directory, _, files in os.walk(top):
        for name in [".", *files]:
            if name == "grows":
                continue
            path = os.path.normpath(os.path.join(directory, name))
            s = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(s.st_mode) else None
            found[path[len(top) :]] = (
                oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink, s.st_size, s.st_rdev, s.st_mtime_ns, target,
                attributes(path),
            )  # fmt: skip
            first.setdefault((s.st_dev, s.st_ino), []).append(path[len(top) :])
    links = sorted(sorted(names) for names in first.values() if len(names) > 1)
    return found, links


def put(path, data, mode=0o644):
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, mode)


def content(path):
    with open(path, "rb") as file:
        return file.read()


def fill(top):
    with open("/proc/self/uid_map") as file:
        first, _, count = map(int, file.readline().split())
    other = first + 7 if count > 7 else os.getuid()
    os.makedirs(f"{top}/deep/er/still", 0o711)
    put(f"{top}/plain", b"plain text\n" * 1000)
    put(f"{top}/empty", b"")
    put(f"{top}/secret", b"for nobody to read", 0)
    put(f"{top}/deep/er/odd name\n\xff".encode("utf-8", "surrogateescape"), b"odd")
    with open(f"{top}/sparse", "wb") as file:
        file.truncate(64 << 20)
        file.seek(40 << 20)
        file.write(b"an island")
    os.link(f"{top}/plain", f"{top}/deep/again")
    os.symlink("../plain", f"{top}/deep/way")
    os.symlink("/nowhere", f"{top}/lost")
    os.mkfifo(f"{top}/fifo", 0o620)
    os.mknod(f"{top}/socket", stat.S_IFSOCK | 0o700)
    put(f"{top}/owned", b"by somebody else")
    os.chown(f"{top}/owned", other, other)
    os.chmod(f"{top}/owned", 0o6755)
    os.chown(f"{top}/lost", other, other, follow_symlinks=False)
    os.mkdir(f"{top}/sticky")
    os.chmod(f"{top}/sticky", 0o1777)
    os.setxattr(f"{top}/plain", "security.test", b"\0attribute")
    acl = b"\2\0\0\0" + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + (number & 0xFFFFFFFF).to_bytes(4, "little")
        for tag, bits, number in ((1, 6, -1), (2, 4, other), (4, 4, -1), (16, 4, -1), (32, 0, -1))
    )
    os.setxattr(f"{top}/empty", ACL_ACCESS, acl)
    for name in (".", "deep", "deep/er", "plain", "lost"):
        os.utime(f"{top}/{name}", ns=(10**18, 10**18 + len(name)), follow_symlinks=False)


def shown(point):
    """How this process's mountinfo describes what is mounted at a place."""
    with open("/proc/self/mountinfo") as file:
        lines = [line.split() for line in file]
    return [
        (words[3], words[5], words[words.index("-") + 1], words[-1]) for words in lines if words[4] == point
    ]


def copy_in_a_namespace(program):
    """The same tmpfs, in a namespace that a user namespace of this process owns."""
    call(libc.unshare, CLONE_NEWUSER | CLONE_NEWNS)
    program.same("copy", lambda: content(f"{POINT}/plain"), lambda: mount("x", POINT, "tmpfs", 0))
    program.same(
        "copy: what the parent writes",
        lambda: content(f"{POINT}/grows")[:5],
        lambda: mount("y", POINT, "tmpfs", 0),
    )
    program.same("copy: locked", lambda: refused(lambda: call(libc.umount2, POINT.encode(), 0)), lambda: None)


def peer_namespace(program):
    """A namespace whose mounts are peers of the parent's: what is mounted here appears there."""
    call(libc.unshare, CLONE_NEWNS)
    event = f"{DIRECTORY}/shared/event"

    def appears():
        mount("event", event, "tmpfs", 0)
        try:
            with open(f"/proc/{os.getppid()}/mountinfo") as file:
                return file.read().count(f" {event} ")
        finally:
            call(libc.umount2, event.encode(), 0)

    program.same("event", appears, lambda: mount(None, f"{DIRECTORY}/shared", None, PRIVATE))


def body(program):
    for name in ("full", "closed", "bound", "sockets", "shared", "busy"):
        os.mkdir(f"{DIRECTORY}/{name}")
    call(libc.unshare, CLONE_NEWNS)
    mount(None, "/", None, REC | PRIVATE)
    mount("ours", POINT, "tmpfs", NOSUID, "size=200m,nr_inodes=500")
    fill(POINT)
    put(f"{POINT}/grows", b"first")
    os.mkdir(f"{POINT}/covered", 0o751)
    put(f"{POINT}/covered/below", b"not to be seen")
    mount("inner", f"{POINT}/covered", "tmpfs", NODEV, "size=1m")
    put(f"{POINT}/covered/above", b"to be seen")
    mount("closed", f"{DIRECTORY}/closed", "tmpfs", 0, "mode=700")
    put(f"{DIRECTORY}/closed/file", b"read-only")
    mount(None, f"{DIRECTORY}/closed", None, REMOUNT | RDONLY)
    mount("sockets", f"{DIRECTORY}/sockets", "tmpfs", 0)
    mount("busy", f"{DIRECTORY}/busy", "tmpfs", 0)
    put(f"{DIRECTORY}/busy/stays", b"")
    mount("shared", f"{DIRECTORY}/shared", "tmpfs", 0)
    mount(None, f"{DIRECTORY}/shared", None, SHARED)
    os.mkdir(f"{DIRECTORY}/shared/event")
    mount(f"{POINT}/deep", f"{DIRECTORY}/bound", None, BIND)

    before = listing(POINT)

    def tree():
        now = listing(POINT)
        if now == before:
            return None
        names = sorted(before[0].keys() | now[0].keys())
        found = [(n, before[0].get(n), now[0].get(n)) for n in names if before[0].get(n) != now[0].get(n)]
        return f"{found}, links {before[1]} and {now[1]}"

    program.check("tree", tree, lambda: os.utime(f"{POINT}/deep", ns=(1, 1)))
    program.same("bytes", lambda: content(f"{POINT}/plain"), lambda: put(f"{POINT}/plain", b"!"))
    program.same(
        "odd name",
        lambda: sorted(os.listdir(f"{POINT}/deep/er".encode())),
        lambda: put(f"{POINT}/deep/er/x", b""),
    )

    def island():
        fd = os.open(f"{POINT}/sparse", os.O_RDONLY)
        try:
            start = os.lseek(fd, 0, os.SEEK_DATA)
            return start, os.lseek(fd, start, os.SEEK_HOLE), os.pread(fd, 9, 40 << 20), os.fstat(fd).st_blocks
        finally:
            os.close(fd)

    program.same("holes", island, lambda: put(f"{POINT}/sparse", b"!"))
    program.same(
        "covered", lambda: content(f"{POINT}/covered/above"), lambda: put(f"{POINT}/covered/above", b"!")
    )
    program.same(
        "mounts",
        lambda: [shown(p) for p in (POINT, f"{POINT}/covered", f"{DIRECTORY}/closed", f"{DIRECTORY}/bound")],
        lambda: mount("more", f"{DIRECTORY}/bound", "tmpfs", 0),
    )
    program.same(
        "read-only",
        lambda: (content(f"{DIRECTORY}/closed/file"), refused(lambda: put(f"{DIRECTORY}/closed/new", b""))),
        lambda: mount(None, f"{DIRECTORY}/closed", None, REMOUNT),
    )
    program.same(
        "bound", lambda: content(f"{DIRECTORY}/bound/again"), lambda: put(f"{DIRECTORY}/bound/again", b"?")
    )

    fd = os.open(f"{POINT}/grows", os.O_RDWR)
    shared = mmap.mmap(fd, 5)

    def through():
        os.pwrite(fd, b"F", 0)
        return (
            shared[:5],
            content(f"{POINT}/grows")[:5],
            os.path.samestat(os.fstat(fd), os.stat(f"{POINT}/grows")),
        )

    program.same("open and mapped", through, lambda: os.unlink(f"{POINT}/grows"))

    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{DIRECTORY}/sockets/listening")
    server.listen()

    def talks():
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{DIRECTORY}/sockets/listening")
            server.accept()[0].close()
            return True

    program.same("listening socket", talks, lambda: os.unlink(f"{DIRECTORY}/sockets/listening"))

    def comes_and_goes():
        """Without a descriptor, which would differ from look to look."""
        os.makedirs(f"{DIRECTORY}/busy/a/b")
        for number in range(20):
            os.mknod(f"{DIRECTORY}/busy/a/b/{number}")
        for number in range(20):
            os.unlink(f"{DIRECTORY}/busy/a/b/{number}")
        os.removedirs(f"{DIRECTORY}/busy/a/b")

    program.child("copy", copy_in_a_namespace)
    program.child("peer", peer_namespace)
    program.busy("files come and go", comes_and_goes)


main(body)
