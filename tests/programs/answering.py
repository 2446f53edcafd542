"""Page faults that the program answers itself, by userfaultfd: of missing pages, of writes, of a child's memory.

What is missing, and what is write-protected, is looked at in /proc/self/pagemap, which makes no page. Memory is touched
by functions of libc, which let the thread that answers run meanwhile.
"""

import ctypes
import errno
import fcntl
import functools
import os
import select
import socket
import struct
import threading

from support import call, libc, main, syscall, wait_for

SYS_MMAP, SYS_USERFAULTFD = 9, 323
READ_WRITE, SHARED, PRIVATE, PRIVATE_ANON, FIXED = 3, 1, 2, 0x22, 0x10
PAGE = 4096
PAGES = 64
HUGE_PAGES, MADV_HUGEPAGE = 512, 14
API, REGISTER, WAKE, COPY, ZERO, PROTECT, CONTINUE = (
    0xC018AA3F, 0xC020AA00, 0x8010AA02, 0xC028AA03, 0xC020AA04, 0xC018AA06, 0xC020AA07,
)  # fmt: skip
MISSING, WP, MINOR = 1, 2, 4
WP_FAULTS, THREAD_ID, MINOR_SHMEM, WP_SHMEM, WP_UNPOPULATED, WP_ASYNC = (
    1 << bit for bit in (0, 8, 10, 12, 13, 15)
)
FAULT = 0x12
PRESENT, SWAPPED, MARKED = 1 << 63, 1 << 62, 1 << 57
#: what the answers are made of; spoiled by another one
key = [7]


def map_pages(count, flags=PRIVATE_ANON, fd=-1):
    return syscall(SYS_MMAP, 0, count * PAGE, READ_WRITE, flags, fd, 0) & 0xFFFF_FFFF_FFFF_FFFF


def content(number):
    return bytes([number, key[0]]) * (PAGE // 2)


def ioctl(fd, request, layout, *values):
    fcntl.ioctl(fd, request, bytearray(struct.pack(layout, *values)))


def answerer(features, flags=os.O_NONBLOCK):
    """With those of the features that this kernel has."""
    user_mode_only = 1
    fd = syscall(SYS_USERFAULTFD, user_mode_only | os.O_CLOEXEC | flags)
    ioctl(fd, API, "<3Q", 0xAA, features & known(), 0)
    return fd


@functools.cache
def known():
    fd = syscall(SYS_USERFAULTFD, 1)
    answer = bytearray(struct.pack("<3Q", 0xAA, 0, 0))
    fcntl.ioctl(fd, API, answer)
    os.close(fd)
    return struct.unpack("<3Q", answer)[1]


def answerer_of_all():
    """One that is told of the kernel's faults, too; None where that is for others only."""
    new = 0xAA00
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR)
    except OSError:
        return None
    try:
        fd = fcntl.ioctl(device, new, os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(device)
    ioctl(fd, API, "<3Q", 0xAA, THREAD_ID, 0)
    return fd


def register(fd, start, pages, modes):
    ioctl(fd, REGISTER, "<4Q", start, pages * PAGE, modes, 0)


def put(fd, page, data):
    source = ctypes.create_string_buffer(data, PAGE)
    ioctl(fd, COPY, "<4Qq", page, ctypes.addressof(source), PAGE, 0, 0)


def protect(fd, start, pages, on=1):
    ioctl(fd, PROTECT, "<3Q", start, pages * PAGE, on)


def bits(start, pages, letters="psw"):
    """Of each page: p there, s a mark where no page is, w write-protected."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entries = struct.unpack(f"<{pages}Q", os.pread(fd, pages * 8, start // PAGE * 8))
    finally:
        os.close(fd)
    names = {"p": PRESENT, "s": SWAPPED, "w": MARKED}
    return ["".join(letter for letter in letters if entry & names[letter]) for entry in entries]


def flags_of(start):
    """The VmFlags of userfaultfd of a mapping."""
    with open("/proc/self/smaps") as file:
        entry = file.read().split(f"\n{start:x}-")[1].split("\nVmFlags:")[1].split("\n")[0]
    return sorted({"um", "uw", "ui"} & set(entry.split()))


def told(fd):
    """What fdinfo says."""
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return dict(
            line.split(":", 1)
            for line in file.read().splitlines()
            if not line.startswith(("pos", "ino", "mnt"))
        )


def read_of(page):
    buffer = ctypes.create_string_buffer(PAGE)
    libc.memcpy(buffer, ctypes.c_void_p(page), PAGE)
    return buffer.raw


def write_to(page):
    libc.memset(ctypes.c_void_p(page), 1, 1)


def forget(at, pages):
    """What is there is no more: other memory of zeros is, which nobody watches."""
    syscall(SYS_MMAP, at, pages * PAGE, READ_WRITE, PRIVATE_ANON | FIXED, -1, 0)


def answer(fds, served, log):
    """Answers for ever: by `fds`, which say the first address of the memory, and what is done."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            try:
                message = os.read(fd, 32)
            except BlockingIOError:
                continue
            event, address, thread = struct.unpack("<B15xQI4x", message)
            assert event == FAULT
            page = address & -PAGE
            first, act = served[fd]
            log.append((fd, (page - first) // PAGE, thread))
            act(fd, page, (page - first) // PAGE)


def put_content(fd, page, number):
    try:
        put(fd, page, content(number))
    except FileExistsError:
        ioctl(fd, WAKE, "<2Q", page, PAGE)


def childs_memory(channel):
    def body(task):
        memory = map_pages(PAGES)
        fd = answerer(0)
        register(fd, memory, PAGES, MISSING)
        socket.send_fds(channel, [memory.to_bytes(8, "little")], [fd])
        os.close(fd)
        channel.close()
        numbers = iter(range(PAGES))

        def ask():
            number = next(numbers)
            found = read_of(memory + number * PAGE)
            return None if found == content(number) else f"page {number} begins with {found[:4]!r}"

        task.check("answered from outside", ask, lambda: forget(memory, PAGES))
        task.same("flags", lambda: flags_of(memory), lambda: None)

    return body


def body(program):
    ours, theirs = socket.socketpair()
    served, log = {}, []

    def attend():
        """The child's descriptor comes while it waits to be ready."""
        data, fds, _, _ = socket.recv_fds(ours, 8, 1)
        ours.close()
        served[fds[0]] = (int.from_bytes(data, "little"), put_content)

    attending = threading.Thread(target=attend)
    attending.start()
    program.child("child", childs_memory(theirs))
    theirs.close()
    attending.join()

    # missing pages
    asking = answerer(THREAD_ID)
    memory = map_pages(PAGES)
    register(asking, memory, PAGES, MISSING)
    served[asking] = (memory, put_content)
    of_all = answerer_of_all()
    if of_all is not None:
        for_kernel = map_pages(PAGES)
        register(of_all, for_kernel, PAGES, MISSING)
        served[of_all] = (for_kernel, put_content)
    partly = map_pages(9)
    register(asking, partly, 9, MISSING)
    for number in (0, 3):
        put(asking, partly + number * PAGE, content(number))
    put(asking, partly + 5 * PAGE, bytes(PAGE))
    ioctl(asking, ZERO, "<3Qq", partly + 7 * PAGE, PAGE, 0, 0)

    # a page that is written may bring its neighbours along, where huge pages are asked for
    huge = map_pages(3 * HUGE_PAGES) + HUGE_PAGES * PAGE - 1 & -HUGE_PAGES * PAGE
    call(libc.madvise, ctypes.c_void_p(huge), 2 * HUGE_PAGES * PAGE, MADV_HUGEPAGE)
    register(asking, huge, 2 * HUGE_PAGES, MISSING)
    for number in (1, HUGE_PAGES + 3):
        put(asking, huge + number * PAGE, content(number % 256))

    # writes
    guarding = answerer(WP_FAULTS)
    guarded = map_pages(PAGES)
    libc.memset(ctypes.c_void_p(guarded), 5, PAGES * PAGE)
    register(guarding, guarded, PAGES, WP)
    protect(guarding, guarded, PAGES)
    served[guarding] = (guarded, lambda fd, page, _: protect(fd, page, 1, 0))
    noted = map_pages(12)
    noting = answerer(WP_UNPOPULATED | WP_ASYNC)
    for number in (0, 1, 2, 6, 7):
        write_to(noted + number * PAGE)
    register(noting, noted, 12, WP)
    protect(noting, noted, 10)
    of_file = None
    if known() & WP_ASYNC:
        for number in (1, 7, 8):
            write_to(noted + number * PAGE)
        with open(__file__, "rb") as file:
            of_file = map_pages(4, PRIVATE, file.fileno())
        write_to(of_file + PAGE)
        write_to(of_file + 2 * PAGE)
        read_of(of_file)
        register(noting, of_file, 4, WP)
        protect(noting, of_file, 3)
        write_to(of_file + PAGE)
    both = map_pages(8)
    doing_both = answerer(WP_FAULTS | WP_UNPOPULATED)
    register(doing_both, both, 8, MISSING | WP)
    for number in (0, 2, 3):
        put(doing_both, both + number * PAGE, content(number))
    protect(doing_both, both + PAGE, 4)

    # shared memory
    file = os.memfd_create("answered")
    os.ftruncate(file, PAGES * PAGE)
    os.pwrite(file, b"".join(content(number) for number in range(PAGES)), 0)
    shared = map_pages(8, SHARED, file)
    of_shared = answerer(WP_SHMEM | WP_UNPOPULATED)
    read_of(shared)
    register(of_shared, shared, 8, WP)
    protect(of_shared, shared, 3)
    late = map_pages(PAGES, SHARED, file)
    continuing = answerer(MINOR_SHMEM, 0)
    os.set_blocking(continuing, False)
    register(continuing, late, PAGES, MINOR)
    served[continuing] = (late, lambda fd, page, _: ioctl(fd, CONTINUE, "<3Qq", page, PAGE, 0, 0))

    # somebody waits
    waiting = answerer(0)
    nothing = map_pages(1)
    register(waiting, nothing, 1, MISSING)
    waiter = threading.Thread(target=read_of, args=(nothing,), daemon=True)
    waiter.start()
    wait_for(lambda: told(waiting)["pending"].strip() == "1", "a thread that waits for its page")
    threading.Thread(target=answer, args=(list(served), served, log), daemon=True).start()

    numbers = {
        "read": iter(range(PAGES - 1)),
        "written": iter(range(PAGES)),
        "continued": iter(range(PAGES)),
        "kernel": iter(range(PAGES)),
    }

    def ask():
        number = next(numbers["read"])
        found = read_of(memory + number * PAGE)
        if found != content(number):
            return f"page {number} begins with {found[:4]!r}"
        expected = (asking, number, threading.get_native_id())
        return None if expected in log else f"was told {log[-2:]}, not {expected}"

    def write():
        number = next(numbers["written"])
        write_to(guarded + number * PAGE)
        found = read_of(guarded + number * PAGE)
        if (guarding, number) not in [one[:2] for one in log]:
            return f"the write was not told: {log[-2:]}"
        return None if found == b"\1" + b"\5" * (PAGE - 1) else f"page {number} begins with {found[:4]!r}"

    def go_on():
        number = next(numbers["continued"])
        found = read_of(late + number * PAGE)
        if (continuing, number) not in [one[:2] for one in log]:
            return f"the fault was not told: {log[-2:]}"
        return None if found == content(number) else f"page {number} begins with {found[:4]!r}"

    def read_into(page):
        """The kernel touches a page for a system call."""
        fd = os.open("/dev/zero", os.O_RDONLY)
        try:
            return libc.read(fd, ctypes.c_void_p(page), 1), ctypes.get_errno() == errno.EFAULT
        finally:
            os.close(fd)

    def of_the_kernel():
        number = next(numbers["kernel"])
        count, _ = read_into(for_kernel + number * PAGE)
        told_of_it = (of_all, number) in [one[:2] for one in log]
        found = read_of(for_kernel + number * PAGE)
        if count == 1 and told_of_it and found == b"\0" + content(number)[1:]:
            return None
        return f"returned {count}, was told {log[-2:]}, begins with {found[:4]!r}"

    def waits():
        wait_for(
            lambda: told(waiting)["pending"].strip() == "1" or not waiter.is_alive(), "the thread that waits"
        )
        return None if waiter.is_alive() else "it goes on"

    def spoil_answers():
        key[0] += 1

    program.check("answers", ask, spoil_answers)
    program.check("writes are told", write, lambda: forget(guarded, PAGES))
    program.check("faults of shared memory are told", go_on, lambda: forget(late, PAGES))
    program.check("somebody waits", waits, lambda: put(waiting, nothing, b""))
    if of_all is not None:
        program.check("the kernel's faults are told", of_the_kernel, lambda: forget(for_kernel, PAGES))
    program.same(
        "the kernel's are not",
        lambda: read_into(memory + (PAGES - 1) * PAGE),
        lambda: put(asking, memory + (PAGES - 1) * PAGE, b""),
    )
    # of a file and of shared memory, what is mapped of it may be no page of this process
    areas = {
        "partly": (partly, 9, "psw"),
        "huge": (huge, 2 * HUGE_PAGES, "psw"),
        "noted": (noted, 12, "psw"),
        "both": (both, 8, "psw"),
        "shared": (shared, 8, "w"),
    }
    if of_file is not None:
        areas["of a file"] = (of_file, 4, "w")
    for name, (start, pages, letters) in areas.items():
        program.same(
            f"pages: {name}",
            lambda at=start, n=pages, told=letters: bits(at, n, told),
            lambda at=start, n=pages: forget(at, n),
        )
        program.same(f"flags: {name}", lambda at=start: flags_of(at), lambda: None)
    for name, start, there in (("partly", partly, (0, 3, 5, 7)), ("both", both, (0, 2, 3))):
        program.same(
            f"content: {name}",
            lambda at=start, pages=there: [read_of(at + page * PAGE) for page in pages],
            lambda: None,
        )
    descriptors = {
        "asking": asking,
        "guarding": guarding,
        "noting": noting,
        "both": doing_both,
        "shared": of_shared,
    }
    for name, fd in descriptors.items():
        program.same(f"descriptor: {name}", lambda fd=fd: told(fd), lambda fd=fd: os.close(fd))


if __name__ == "__main__":
    main(body)
