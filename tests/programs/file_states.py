"""What is rare among open files: leases, locks that are waited for, lost names, removed directories, its own /proc."""

import contextlib
import fcntl
import os
import signal
import struct
import time

from support import DIRECTORY, main, wait_for

F_SETSIG, F_OFD_SETLK, F_OFD_SETLKW, F_OFD_GETLK = 10, 37, 38, 36
F_GET_RW_HINT, F_SET_RW_HINT, RWH_LONG = 1035, 1036, 4
LEASE_SIGNAL = signal.SIGRTMIN + 5


def make(name, content=b"0123456789", mode=0o644):
    path = f"{DIRECTORY}/{name}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode)
    os.write(fd, content)
    os.close(fd)
    return path


def position(fd):
    return os.lseek(fd, 0, os.SEEK_CUR)


def read(path):
    with open(path, "rb") as file:
        return file.read(4096)


def whole(fd):
    return os.pread(fd, 1 << 16, 0)


def flock_bytes(kind, start, length):
    return struct.pack("<hh4xqqi4x", kind, os.SEEK_SET, start, length, 0)


def leases(program):
    """Two leases; who opens the file of one is noticed, by the signal that was asked for."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {LEASE_SIGNAL})
    path = make("leased")
    write = os.open(path, os.O_RDWR)
    fcntl.fcntl(write, F_SETSIG, LEASE_SIGNAL)
    fcntl.fcntl(write, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    read = os.open(make("lease for reading"), os.O_RDONLY)
    fcntl.fcntl(read, fcntl.F_SETLEASE, fcntl.F_RDLCK)

    def kinds():
        return fcntl.fcntl(write, fcntl.F_GETLEASE), fcntl.fcntl(read, fcntl.F_GETLEASE)

    program.same("leases", kinds, lambda: fcntl.fcntl(read, fcntl.F_SETLEASE, fcntl.F_UNLCK))

    def broken():
        with contextlib.suppress(BlockingIOError):
            os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        told = signal.sigtimedwait({LEASE_SIGNAL}, 1)
        # given back and taken again, so that the next check finds it as it was
        fcntl.fcntl(write, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        fcntl.fcntl(write, F_SETSIG, LEASE_SIGNAL)
        fcntl.fcntl(write, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return told is not None and (told.si_signo, told.si_band != 0)

    program.same(
        "a lease that is broken", broken, lambda: fcntl.fcntl(write, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    )


def locks(program):
    """A child waits for each kind of lock that the parent holds, and gets it when that lets go."""
    path = make("locked")
    flocked, posix, ofd = (os.open(path, os.O_RDWR) for _ in range(3))
    fcntl.flock(flocked, fcntl.LOCK_EX)
    fcntl.lockf(posix, fcntl.LOCK_EX, 5, 10)
    fcntl.fcntl(ofd, F_OFD_SETLK, flock_bytes(fcntl.F_WRLCK, 100, 7))
    waiting = {
        "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX),
        "posix": lambda fd: fcntl.lockf(fd, fcntl.LOCK_EX, 5, 10),
        "ofd": lambda fd: fcntl.fcntl(fd, F_OFD_SETLKW, flock_bytes(fcntl.F_WRLCK, 100, 7)),
    }
    children = {}
    for name, wait in waiting.items():
        pid = os.fork()
        if pid == 0:
            try:
                wait(os.open(path, os.O_RDWR))
                program.put(f"got.{name}", "")
                signal.pause()
            finally:
                os._exit(1)
        children[name] = pid
        program.children.append(pid)

    def all_wait():
        with open("/proc/locks") as table:
            return sum("->" in line for line in table) >= len(waiting)

    wait_for(all_wait, "children that wait for locks")
    release = {
        "flock": lambda: fcntl.flock(flocked, fcntl.LOCK_UN),
        "posix": lambda: fcntl.lockf(posix, fcntl.LOCK_UN, 5, 10),
        "ofd": lambda: fcntl.fcntl(ofd, F_OFD_SETLK, flock_bytes(fcntl.F_UNLCK, 100, 7)),
    }
    checked = []

    def waits_and_gets():
        """The first time it is asked after a restore: nobody has got it, and who waits gets it then."""
        if checked:
            missing = [name for name in waiting if not program.exists(f"got.{name}")]
            return f"{missing} have lost their locks" if missing else None
        checked.append(True)
        time.sleep(0.05)
        early = [name for name in waiting if program.exists(f"got.{name}")]
        if early:
            return f"{early} was had by two at once"
        for act in release.values():
            act()
        try:
            wait_for(lambda: all(program.exists(f"got.{name}") for name in waiting), "locks", 2.0)
        except RuntimeError:
            return f"{[name for name in waiting if not program.exists(f'got.{name}')]} never came"
        return None

    def end_waiting():
        for name, pid in children.items():
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"got.{name}", dir_fd=program.directory)
        checked.append(True)

    program.check("locks that are waited for", waits_and_gets, end_waiting)

    ranges = os.open(make("ranges"), os.O_RDWR)
    fcntl.lockf(ranges, fcntl.LOCK_SH, 10, 0)
    fcntl.lockf(ranges, fcntl.LOCK_EX, 10, 50)

    def holder_of_ranges(child):
        mine = os.dup(ranges)
        fcntl.lockf(mine, fcntl.LOCK_SH, 10, 0)

    program.child("ranges", holder_of_ranges)

    def table():
        """Both may look at any byte: locks of the own process do not show, those of the child do."""
        found = []
        for start in (0, 5, 20, 50, 55):
            kind, _, at, length, pid = struct.unpack(
                "<hh4xqqi4x", fcntl.fcntl(ranges, fcntl.F_GETLK, flock_bytes(fcntl.F_WRLCK, start, 1))
            )
            found.append((kind, at, length, pid) if kind != fcntl.F_UNLCK else None)
        with open(f"/proc/self/fdinfo/{ranges}") as info:
            own = [line.split()[2:5:2] + line.split()[-2:] for line in info if line.startswith("lock:")]
        return found, sorted(own)

    program.same("ranges of two processes", table, lambda: fcntl.lockf(ranges, fcntl.LOCK_UN, 10, 50))


def names(program):
    """Files whose name went away, in all the ways that editors and package managers know."""
    changed = make("edited", b"the old text")
    edited = os.open(changed, os.O_RDONLY)
    os.lseek(edited, 4, os.SEEK_SET)
    os.rename(make("edited.new", b"the new text"), changed)
    program.same(
        "replaced under its name",
        lambda: (whole(edited), position(edited), os.fstat(edited).st_nlink, read(changed)),
        lambda: os.lseek(edited, 0, os.SEEK_SET),
    )

    path = make("first name", b"of two")
    linked = os.open(path, os.O_RDWR | os.O_APPEND)
    os.link(path, f"{DIRECTORY}/second name")
    os.unlink(path)

    def still_the_same():
        os.write(linked, b"!")
        same = read(f"{DIRECTORY}/second name") == whole(linked)
        os.ftruncate(linked, 6)
        return same, os.fstat(linked).st_nlink, os.readlink(f"/proc/self/fd/{linked}")[-10:]

    program.same(
        "opened by a name that is gone", still_the_same, lambda: os.unlink(f"{DIRECTORY}/second name")
    )

    renamed = os.open(make("before"), os.O_RDONLY)
    os.rename(f"{DIRECTORY}/before", f"{DIRECTORY}/after")
    program.same(
        "renamed",
        lambda: (os.readlink(f"/proc/self/fd/{renamed}"), whole(renamed)),
        lambda: os.close(renamed),
    )

    path = make("noted", b"with notes", 0o640)
    noted = os.open(path, os.O_RDWR)
    os.setxattr(noted, "user.note", b"a note")
    own = os.getuid()
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry)
        for entry in (
            (1, 6, 0xFFFFFFFF),
            (2, 4, own),
            (4, 4, 0xFFFFFFFF),
            (16, 4, 0xFFFFFFFF),
            (32, 0, 0xFFFFFFFF),
        )
    )
    os.setxattr(noted, "system.posix_acl_access", acl)
    os.unlink(path)
    program.same(
        "deleted, with attributes and a list of who may",
        lambda: (
            os.getxattr(noted, "user.note"),
            os.getxattr(noted, "system.posix_acl_access"),
            oct(os.fstat(noted).st_mode),
            os.fstat(noted).st_uid == own,
        ),
        lambda: os.removexattr(noted, "user.note"),
    )

    huge = os.open(make("huge"), os.O_RDWR)
    os.unlink(f"{DIRECTORY}/huge")
    os.ftruncate(huge, 100 << 30)
    os.pwrite(huge, b"far out", 77 << 30)
    program.same(
        "deleted, of 100 GiB of holes",
        lambda: (os.fstat(huge).st_size, os.pread(huge, 7, 77 << 30), os.fstat(huge).st_blocks < 4096),
        lambda: os.pwrite(huge, b"x" * (4 << 20), 50 << 30),
    )

    hinted = os.open(make("hinted"), os.O_RDWR)
    fcntl.fcntl(hinted, F_SET_RW_HINT, struct.pack("<Q", RWH_LONG))
    program.same(
        "write lifetime hint",
        lambda: fcntl.fcntl(hinted, F_GET_RW_HINT, bytes(8)),
        lambda: fcntl.fcntl(hinted, F_SET_RW_HINT, struct.pack("<Q", 2)),
    )


def removed(program):
    """A directory that is gone, with all above it, and who is in it."""
    os.makedirs(f"{DIRECTORY}/gone/below")
    os.chmod(f"{DIRECTORY}/gone/below", 0o751)
    held = os.open(f"{DIRECTORY}/gone/below", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir(f"{DIRECTORY}/gone/below")
    os.rmdir(f"{DIRECTORY}/gone/below")
    os.rmdir(f"{DIRECTORY}/gone")

    def state():
        try:
            os.mkdir("new", dir_fd=held)
        except FileNotFoundError:
            found = os.fstat(held)
            try:
                where = os.getcwd()
            except FileNotFoundError:
                where = None
            here = os.stat(".")
            return (
                oct(found.st_mode), found.st_nlink, found.st_uid, os.listdir(held), where,
                here.st_ino == found.st_ino, os.path.exists(f"{DIRECTORY}/gone"),
                os.readlink("/proc/self/cwd"), os.readlink(f"/proc/self/fd/{held}"),
            )  # fmt: skip
        return "it is alive"

    program.same("a removed directory, and being in it", state, lambda: os.chdir("/"))


def of_itself(program):
    """Files of /proc about processes of the tree, which say what they said, or the same of the new process."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(1)
    program.children.append(child)
    proc = f"/proc/{os.getpid()}"

    def first(fd, size=4096):
        os.lseek(fd, 0, os.SEEK_SET)
        return os.read(fd, size)

    maps = os.open("/proc/self/maps", os.O_RDONLY)
    program.same(
        "/proc/self/maps",
        lambda: first(maps).split(b"\n")[0] == read("/proc/self/maps").split(b"\n")[0],
        lambda: os.dup2(0, maps),
    )
    about = os.open("/proc/self/status", os.O_RDONLY)
    os.read(about, 30)
    program.same("/proc/self/status: position", lambda: position(about), lambda: os.lseek(about, 0, 0))
    others = os.open(f"/proc/{child}/stat", os.O_RDONLY)
    program.same("/proc/CHILD/stat", lambda: first(others).split()[:1], lambda: os.dup2(maps, others))
    told = os.open(f"/proc/self/fdinfo/{about}", os.O_RDONLY)
    begun = os.open(f"/proc/self/fdinfo/{maps}", os.O_RDONLY)
    os.read(begun, 5)
    program.same("/proc/self/fdinfo", lambda: whole(told).split()[:2], lambda: os.close(told))
    program.same(
        "/proc/self/fdinfo, begun",
        lambda: (position(begun), whole(begun).split()[0]),
        lambda: os.lseek(begun, 1, 0),
    )
    uids = os.open("/proc/self/uid_map", os.O_RDONLY)
    program.same("/proc/self/uid_map", lambda: first(uids).split(), lambda: os.dup2(maps, uids))
    score = os.open("/proc/self/oom_score_adj", os.O_RDWR)

    def settable():
        os.pwrite(score, b"77", 0)
        return read("/proc/self/oom_score_adj")

    program.same("/proc/self/oom_score_adj, for writing", settable, lambda: os.dup2(maps, score))
    mine = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    program.same(
        "/proc/self/fd",
        lambda: (str(mine) in os.listdir(mine), os.readlink(f"/proc/self/fd/{mine}") == f"{proc}/fd"),
        lambda: os.dup2(0, mine),
    )
    place = os.open(f"/proc/{child}", os.O_PATH)
    program.same(
        "/proc/CHILD as a place",
        lambda: os.readlink("ns/pid", dir_fd=place) == os.readlink("/proc/self/ns/pid"),
        lambda: os.dup2(maps, place),
    )
    thread = os.open(f"/proc/self/task/{os.getpid()}/comm", os.O_RDWR)
    program.same("/proc/self/task/TID/comm", lambda: first(thread), lambda: os.write(thread, b"other"))


def body(program):
    leases(program)
    locks(program)
    names(program)
    removed(program)
    of_itself(program)


main(body)
