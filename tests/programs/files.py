"""Regular files, directories, deleted files, O_PATH, devices: offsets, flags, and who shares which open file."""

import fcntl
import os
import signal
import stat
import threading

from support import DIRECTORY, main, prctl, syscall

SYS_CLONE, SYS_KCMP, SYS_GETDENTS64, KCMP_FILE, SYS_SETRESUID = 56, 312, 217, 0, 117
CLONE_FS = 0x200
F_GETOWNER_UIDS, PR_SET_DUMPABLE = 17, 4


def same_file(pid_a, fd_a, pid_b, fd_b):
    return syscall(SYS_KCMP, pid_a, pid_b, KCMP_FILE, fd_a, fd_b) == 0


def position(fd):
    return os.lseek(fd, 0, os.SEEK_CUR)


def flags(fd):
    return fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETFD)


def content(fd):
    return os.pread(fd, 1 << 20, 0)


def on_behalf_of_another(act):
    """`act` in a thread with other ids, which the kernel remembers."""

    def run():
        syscall(SYS_SETRESUID, 3, 4, 0xFFFFFFFF)
        act()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    prctl(PR_SET_DUMPABLE, 1)


def regular(program):
    path = f"{DIRECTORY}/regular"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    os.write(fd, b"0123456789" * 100)
    os.lseek(fd, 123, os.SEEK_SET)
    program.same("offset", lambda: position(fd), lambda: os.lseek(fd, 1, os.SEEK_SET))
    program.same("close-on-exec", lambda: flags(fd), lambda: fcntl.fcntl(fd, fcntl.F_SETFD, 0))

    append = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOATIME)
    program.same("append, nonblocking", lambda: flags(append), lambda: fcntl.fcntl(append, fcntl.F_SETFL, 0))
    readonly = os.open(path, os.O_RDONLY)

    def write_refused():
        try:
            os.write(readonly, b"x")
        except OSError as error:
            return error.errno

    program.same("read-only", write_refused, lambda: os.dup2(append, readonly))

    # fd numbers with a hole, and one far up
    high = fcntl.fcntl(fd, fcntl.F_DUPFD, 700)
    os.lseek(fd, 123, os.SEEK_SET)
    program.same(
        "dup shares",
        lambda: (high, same_file(os.getpid(), fd, os.getpid(), high)),
        lambda: os.dup2(readonly, high),
    )

    # of no file whose position somebody else looks at
    twin = os.dup(readonly)

    def moves_together():
        os.lseek(readonly, 5, os.SEEK_CUR)
        together = position(twin) == position(readonly)
        os.lseek(readonly, -5, os.SEEK_CUR)
        return together

    program.same("dup moves together", moves_together, lambda: os.dup2(0, twin))
    program.same(
        "opened twice is not shared",
        lambda: same_file(os.getpid(), fd, os.getpid(), readonly),
        lambda: os.dup2(fd, readonly),
    )

    locked = os.open(path, os.O_RDWR)
    on_behalf_of_another(lambda: fcntl.fcntl(locked, fcntl.F_SETOWN, os.getpid()))
    program.same(
        "owner",
        lambda: (fcntl.fcntl(locked, fcntl.F_GETOWN), fcntl.fcntl(locked, F_GETOWNER_UIDS, bytes(8))),
        lambda: fcntl.fcntl(locked, fcntl.F_SETOWN, 0),
    )
    return fd


def deleted(program):
    path = f"{DIRECTORY}/deleted"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o604)
    os.write(fd, b"content without a name " * 1000)
    other = os.open(path, os.O_RDONLY)
    os.unlink(path)
    os.lseek(fd, 77, os.SEEK_SET)
    program.same("deleted: content", lambda: content(fd), lambda: os.pwrite(fd, b"!", 5))
    program.same("deleted: offset", lambda: position(fd), lambda: os.lseek(fd, 0, os.SEEK_SET))
    program.same(
        "deleted: attributes",
        lambda: (oct(os.fstat(fd).st_mode), os.fstat(fd).st_nlink),
        lambda: os.fchmod(fd, 0o777),
    )

    def both():
        return os.fstat(fd).st_ino == os.fstat(other).st_ino

    program.same("deleted: one inode", both, lambda: os.dup2(os.open("/dev/null", os.O_RDONLY), other))

    path = f"{DIRECTORY}/sparse"
    sparse = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.unlink(path)
    os.ftruncate(sparse, 64 << 20)
    os.pwrite(sparse, b"island", 40 << 20)
    program.same(
        "sparse: size and island",
        lambda: (os.fstat(sparse).st_size, os.pread(sparse, 16, (40 << 20) - 5)),
        lambda: os.ftruncate(sparse, 10),
    )
    program.check(
        "sparse: stays sparse",
        lambda: (
            None if os.fstat(sparse).st_blocks * 512 < 1 << 20 else f"{os.fstat(sparse).st_blocks} blocks"
        ),
        lambda: os.pwrite(sparse, b"x" * (2 << 20), 0),
    )
    unnamed = os.open(DIRECTORY, os.O_RDWR | os.O_TMPFILE, 0o600)
    os.write(unnamed, b"never had a name")
    program.same("O_TMPFILE", lambda: (content(unnamed), position(unnamed)), lambda: os.write(unnamed, b"!"))


def directories(program):
    where = f"{DIRECTORY}/entries"
    os.mkdir(where)
    for number in range(300):
        os.close(os.open(f"{where}/entry-with-a-rather-long-name-{number:04}", os.O_CREAT | os.O_WRONLY))
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY)

    def read_some(fd):
        import ctypes

        buffer = ctypes.create_string_buffer(4096)
        return buffer.raw[: syscall(SYS_GETDENTS64, fd, buffer, 4096)]

    read_some(fd)
    place = position(fd)

    def rest():
        os.lseek(fd, place, os.SEEK_SET)
        pieces = []
        while piece := read_some(fd):
            pieces.append(piece)
        os.lseek(fd, place, os.SEEK_SET)
        return b"".join(pieces)

    program.same("directory: place", lambda: position(fd), lambda: os.lseek(fd, 0, os.SEEK_SET))
    program.same(
        "directory: the rest", rest, lambda: [os.unlink(f"{where}/{name}") for name in os.listdir(where)]
    )

    path_only = os.open(where, os.O_PATH)
    program.same("O_PATH", lambda: flags(path_only), lambda: os.dup2(fd, path_only))
    program.same(
        "O_PATH: openat below",
        lambda: content(os.open("../regular", os.O_RDONLY, dir_fd=path_only))[:10],
        lambda: os.rename(f"{DIRECTORY}/regular", f"{DIRECTORY}/gone"),
    )


def devices(program):
    null = os.open("/dev/null", os.O_RDWR)
    zero = os.open("/dev/zero", os.O_RDONLY | os.O_NONBLOCK)
    program.same(
        "/dev/null",
        lambda: (
            os.fstat(null).st_rdev,
            stat.S_ISCHR(os.fstat(null).st_mode),
            os.read(null, 1),
            os.write(null, b"x"),
        ),
        lambda: os.dup2(zero, null),
    )
    program.same(
        "/dev/zero", lambda: (os.fstat(zero).st_rdev, os.read(zero, 4), flags(zero)), lambda: os.dup2(0, zero)
    )
    full = os.open("/dev/full", os.O_WRONLY)
    program.same("/dev/full", lambda: os.fstat(full).st_rdev, lambda: os.dup2(0, full))
    random = os.open("/dev/urandom", os.O_RDONLY)
    program.same("/dev/urandom", lambda: len(os.read(random, 9)), lambda: os.dup2(0, random))


def between_processes(program, fd):
    parent = os.getpid()

    def body(child):
        child.same("fork shares", lambda: same_file(parent, fd, os.getpid(), fd), lambda: os.dup2(0, fd))
        child.same("offset", lambda: position(fd), lambda: os.dup2(0, fd))

    program.child("child", body)


def working_directory(program):
    os.mkdir(f"{DIRECTORY}/here")
    os.chdir(f"{DIRECTORY}/here")
    os.umask(0o027)
    program.same("cwd", os.getcwd, lambda: os.chdir("/"))

    def umask():
        now = os.umask(0)
        os.umask(now)
        return now

    program.same("umask", umask, lambda: os.umask(0o777 & ~0o200))

    def changed_root(child):
        os.mkdir(f"{DIRECTORY}/root")
        os.mkdir(f"{DIRECTORY}/root/inside")
        os.chroot(f"{DIRECTORY}/root")
        os.chdir("/inside")
        child.same("root", lambda: (sorted(os.listdir("/")), os.getcwd()), lambda: os.mkdir("/new"))

    program.child("chroot", changed_root)

    def looks(*paths):
        found = []
        for path in paths:
            try:
                found.append(sorted(os.listdir(path)))
            except OSError as error:
                found.append(error.errno)
        return found

    def nowhere(child):
        """A root directory as that of the sandbox of a browser: of a process that has ended."""
        helper = syscall(SYS_CLONE, CLONE_FS | signal.SIGCHLD, 0, 0, 0, 0)
        if not helper:
            os.chroot("/proc/self/fdinfo")
            os.chdir("/")
            os._exit(0)
        os.waitpid(helper, 0)
        child.same(
            "root",
            lambda: looks("/", ".", "..", "/proc"),
            lambda: os.fchdir(child.directory) or os.chroot("."),
        )

    def left_behind(child):
        helper = os.fork()
        if not helper:
            signal.pause()
        os.chdir(f"/proc/{helper}")
        os.kill(helper, signal.SIGKILL)
        os.waitpid(helper, 0)
        child.same("cwd", lambda: (looks(".", "fd"), looks("/") == []), lambda: os.chdir("/"))

    program.child("nowhere", nowhere)
    program.child("left behind", left_behind)


def body(program):
    fd = regular(program)
    deleted(program)
    directories(program)
    devices(program)
    between_processes(program, fd)
    working_directory(program)


main(body)
