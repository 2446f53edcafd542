"""inotify and fanotify: numbers of watches, masks, what is watched, and that events arrive."""

import ctypes
import fcntl
import os
import struct
import termios

from support import call, libc, main, syscall

IN_MODIFY, IN_CREATE, IN_DELETE, IN_OPEN, IN_ALL = 0x2, 0x100, 0x200, 0x20, 0xFFF
IN_IGNORED, IN_ONESHOT, IN_EXCL_UNLINK, IN_DONT_FOLLOW = 0x8000, 0x8000_0000, 0x400_0000, 0x200_0000
FANOTIFY_INIT, FANOTIFY_MARK, FAN_MARK_ADD, FAN_MARK_FLUSH = 300, 301, 1, 0x80
FAN_REPORT_FID, FAN_REPORT_DFID_NAME, FAN_NONBLOCK = 0x200, 0xC00, 2


class Instance:
    def __init__(self):
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)

    def add(self, path, mask):
        wd = libc.inotify_add_watch(self.fd, os.fsencode(path), ctypes.c_uint(mask))
        if wd < 0:
            raise OSError(ctypes.get_errno(), path)
        return wd

    def remove(self, wd):
        call(libc.inotify_rm_watch, self.fd, wd)

    def events(self):
        """(number, mask, name) of all that is in the queue."""
        if not struct.unpack("<i", fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)))[0]:
            return []
        content = os.read(self.fd, 65536)
        found = []
        while content:
            wd, mask, _, size = struct.unpack_from("<iIII", content)
            found.append((wd, mask, content[16 : 16 + size].rstrip(b"\0").decode()))
            content = content[16 + size :]
        return found

    def watches(self):
        with open(f"/proc/self/fdinfo/{self.fd}") as file:
            lines = [line.split() for line in file if line.startswith("inotify")]
        return sorted((int(line[1][3:], 16), line[4]) for line in lines)


def touch(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC))


def body(program):
    place = f"/proc/self/fd/{program.directory}/watched"
    os.mkdir(place)
    place = os.readlink(f"/proc/self/fd/{program.directory}") + "/watched"
    for name in ("sub", "quiet", "marked"):
        os.mkdir(f"{place}/{name}")
    for name in ("file", "once", "other", "gone", "quiet/file"):
        touch(f"{place}/{name}")
    os.symlink("file", f"{place}/link")
    instance = Instance()
    instance.add(place, IN_CREATE | IN_DELETE | IN_EXCL_UNLINK)
    removed = [instance.add(f"{place}/other", IN_ALL)]
    instance.add(f"{place}/file", IN_MODIFY | IN_ONESHOT)
    removed.append(instance.add(f"{place}/sub", IN_ALL))
    instance.add(f"{place}/link", IN_ALL | IN_DONT_FOLLOW)
    instance.add("/proc/self/status", IN_MODIFY)
    gone = os.open(f"{place}/gone", os.O_RDWR | os.O_CLOEXEC)
    instance.add(f"{place}/gone", IN_MODIFY)
    for wd in removed:
        instance.remove(wd)
    os.unlink(f"{place}/gone")
    last = instance.add(f"{place}/sub", IN_ALL & ~IN_OPEN)
    instance.events()

    program.same("inotify: numbers and masks", instance.watches, lambda: instance.remove(last))

    def happens():
        quiet = instance.events()
        touch(f"{place}/new")
        os.unlink(f"{place}/new")
        os.write(gone, b"x")
        return quiet, instance.events()

    program.same("inotify: events", happens, lambda: instance.remove(1))

    def next_number():
        wd = instance.add(f"{place}/other", IN_ALL)
        instance.remove(wd)
        ignored = instance.events() == [(wd, IN_IGNORED, "")]
        return ignored, wd > last

    program.same("inotify: the next number", next_number, lambda: os.unlink(f"{place}/other"))

    marked = syscall(FANOTIFY_INIT, FAN_REPORT_FID | FAN_REPORT_DFID_NAME | FAN_NONBLOCK, 0)
    syscall(FANOTIFY_MARK, marked, FAN_MARK_ADD, IN_CREATE | IN_DELETE, -100, f"{place}/marked".encode())

    def reported():
        touch(f"{place}/marked/new")
        os.unlink(f"{place}/marked/new")
        content, masks = os.read(marked, 4096), []
        while content:
            masks.append(struct.unpack_from("<Q", content, 8)[0])
            content = content[struct.unpack_from("<I", content)[0] :]
        return masks

    reported()
    program.same("fanotify", reported, lambda: syscall(FANOTIFY_MARK, marked, FAN_MARK_FLUSH, 0, -100, b"/"))

    once = Instance()

    def oneshot():
        wd = once.add(f"{place}/once", IN_MODIFY | IN_ONESHOT)
        fd = os.open(f"{place}/once", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"x")
        os.write(fd, b"x")
        os.close(fd)
        once.add(f"{place}/once", IN_MODIFY | IN_ONESHOT)
        return [mask for number, mask, _ in once.events() if number == wd]

    oneshot()
    program.same(
        "inotify: one shot",
        oneshot,
        lambda: (once.events(), os.rename(f"{place}/once", f"{place}/moved")),
    )
    everything = Instance()
    everything.add(f"{place}/quiet", IN_ALL)
    everything.add(f"{place}/quiet/file", IN_ALL)
    opened = os.open(f"{place}/quiet/file", os.O_RDWR | os.O_CLOEXEC)
    everything.events()
    program.same(
        "inotify: what the restore does is not seen", everything.events, lambda: os.write(opened, b"x")
    )


main(body)
