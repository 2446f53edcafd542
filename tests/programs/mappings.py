"""One process with every kind of mapping: values, protections, guard pages, advice, locks, names."""

import ctypes
import errno
import os
import random

from support import DIRECTORY, libc, main, syscall

SYS_MMAP, SYS_MPROTECT, SYS_MUNMAP, SYS_MADVISE, SYS_MLOCK, SYS_MLOCK2 = 9, 10, 11, 28, 149, 325
PROT_NONE, READ, WRITE, EXEC = 0, 1, 2, 4
SHARED, PRIVATE, FIXED, ANON, GROWSDOWN, NORESERVE = 1, 2, 0x10, 0x20, 0x100, 0x4000
MADV_DONTFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_WIPEONFORK = 10, 14, 15, 16, 18
MADV_RANDOM, MADV_SEQUENTIAL, MADV_GUARD_INSTALL = 1, 2, 102
MLOCK_ONFAULT = 1
PR_SET_VMA, PR_SET_VMA_ANON_NAME = 0x53564D41, 0
PAGE = 4096


def map_at(length, prot=READ | WRITE, flags=PRIVATE | ANON, fd=-1, offset=0, address=0):
    return syscall(SYS_MMAP, address, length, prot, flags, fd, offset) & 0xFFFF_FFFF_FFFF_FFFF


def readable(address, length=1):
    """Whether the kernel can read there: EFAULT without any signal."""
    read, write = os.pipe()
    try:
        syscall(1, write, address, length)
        return True
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise
        return False
    finally:
        os.close(read)
        os.close(write)


def smaps(address):
    """The mapping that holds `address`: size, permissions, offset, name, Locked, VmFlags.

    Without "gu", which says that the mapping or one it was once joined with has had guards: where the kernel puts
    the mappings decides about it.
    """
    with open("/proc/self/smaps") as file:
        text = file.read()
    entry = None
    for line in text.splitlines():
        head = line.split()
        if not head[0].endswith(":"):
            if entry is not None:
                return entry
            start, end = (int(x, 16) for x in head[0].split("-"))
            if start <= address < end:
                entry = [end - start, *head[1:3], " ".join(head[5:])]
        elif entry is not None and head[0] in {"Locked:", "VmFlags:"}:
            entry.append(" ".join(word for word in head[1:] if word != "gu"))
    return entry


def put(address, data):
    ctypes.memmove(address, data, len(data))


def get(address, length):
    return ctypes.string_at(address, length)


def locking(address, length):
    """Changes the flags of a mapping and nothing else."""
    return lambda: syscall(SYS_MLOCK, address, length)


def anonymous(program):
    data = random.Random(1).randbytes(300 * PAGE)
    private = map_at(400 * PAGE)
    put(private + 50 * PAGE, data)
    program.same("private", lambda: get(private, 400 * PAGE), lambda: put(private + 99 * PAGE, b"!"))
    program.same(
        "private: untouched pages read as zero",
        lambda: get(private, PAGE) == bytes(PAGE),
        lambda: put(private, b"!"),
    )

    shared = map_at(64 * PAGE, flags=SHARED | ANON)
    put(shared + 5 * PAGE, data[: 20 * PAGE])
    program.same("shared", lambda: get(shared, 64 * PAGE), lambda: put(shared, b"!"))

    big = map_at(1 << 36, flags=PRIVATE | ANON | NORESERVE)
    put(big + (1 << 35), b"an island in 64 GiB")
    program.same(
        "reserved, sparse", lambda: (get(big + (1 << 35), 20), smaps(big)), lambda: put(big + (1 << 35), b"!")
    )

    none = map_at(8 * PAGE)
    put(none, b"behind PROT_NONE" * 100)
    syscall(SYS_MPROTECT, none, 8 * PAGE, PROT_NONE)

    def behind():
        hidden = readable(none)
        syscall(SYS_MPROTECT, none, 8 * PAGE, READ)
        found = get(none, 1600)
        syscall(SYS_MPROTECT, none, 8 * PAGE, PROT_NONE)
        return hidden, found

    program.same(
        "PROT_NONE with content",
        behind,
        lambda: syscall(SYS_MPROTECT, none, 8 * PAGE, READ | WRITE) or put(none, b"!"),
    )

    readonly = map_at(4 * PAGE)
    put(readonly, b"read-only now")
    syscall(SYS_MPROTECT, readonly, 4 * PAGE, READ)
    program.same(
        "read-only",
        lambda: (get(readonly, 20), smaps(readonly)[1]),
        lambda: syscall(SYS_MPROTECT, readonly, 4 * PAGE, READ | WRITE),
    )

    code = map_at(PAGE, READ | WRITE)
    put(code, bytes.fromhex("b82a000000c3"))  # mov eax, 42; ret
    syscall(SYS_MPROTECT, code, PAGE, READ | EXEC)
    program.same(
        "code that was written",
        ctypes.CFUNCTYPE(ctypes.c_int)(code),
        lambda: (
            syscall(SYS_MPROTECT, code, PAGE, READ | WRITE)
            or put(code, bytes.fromhex("b82b000000c3"))
            or syscall(SYS_MPROTECT, code, PAGE, READ | EXEC)
        ),
    )

    guarded = map_at(16 * PAGE)
    put(guarded, b"g" * 16 * PAGE)
    syscall(SYS_MADVISE, guarded + 4 * PAGE, 2 * PAGE, MADV_GUARD_INSTALL)
    program.same(
        "guard pages",
        lambda: [readable(guarded + n * PAGE) for n in range(16)],
        lambda: syscall(SYS_MADVISE, guarded, PAGE, MADV_GUARD_INSTALL),
    )

    down = map_at(8 * PAGE, flags=PRIVATE | ANON | GROWSDOWN)
    put(down, b"grows down")
    program.same("grows down", lambda: (get(down, 10), smaps(down)[-1]), locking(down, 8 * PAGE))


def heap(program):
    start = libc.sbrk
    start.restype = ctypes.c_void_p
    start.argtypes = [ctypes.c_long]
    area = start(50 * PAGE)
    put(area, b"heap" * 5000)
    program.same("heap", lambda: get(area, 50 * PAGE), lambda: put(area, b"!"))

    def grows():
        before = start(0)
        if start(PAGE) != before:
            return "brk does not grow"
        put(before, b"x" * PAGE)
        start(-PAGE)
        return None if start(0) == before else "brk does not shrink"

    def block():
        end = (start(0) + PAGE - 1) // PAGE * PAGE
        map_at(PAGE, PROT_NONE, PRIVATE | ANON | FIXED, address=end)

    program.check("brk grows", grows, block)


def advice(program):
    for name, value in (
        ("DONTFORK", MADV_DONTFORK),
        ("DONTDUMP", MADV_DONTDUMP),
        ("WIPEONFORK", MADV_WIPEONFORK),
        ("HUGEPAGE", MADV_HUGEPAGE),
        ("NOHUGEPAGE", MADV_NOHUGEPAGE),
        ("SEQUENTIAL", MADV_SEQUENTIAL),
        ("RANDOM", MADV_RANDOM),
    ):
        # Holes around keep it from being joined with its neighbours.
        area = map_at(8 * PAGE) + PAGE
        syscall(SYS_MUNMAP, area - PAGE, PAGE)
        syscall(SYS_MUNMAP, area + 5 * PAGE, 2 * PAGE)
        put(area, name.encode())
        syscall(SYS_MADVISE, area, 5 * PAGE, value)
        program.same(
            f"advice {name}", lambda area=area: (get(area, 12), smaps(area)), locking(area, 5 * PAGE)
        )
    mixed = map_at(9 * PAGE)
    syscall(SYS_MADVISE, mixed + 3 * PAGE, 3 * PAGE, MADV_DONTDUMP)
    syscall(SYS_MADVISE, mixed + 3 * PAGE, 3 * PAGE, MADV_DONTFORK)
    program.same(
        "two advices", lambda: [smaps(mixed + n * PAGE)[-1] for n in (0, 4, 8)], locking(mixed, 9 * PAGE)
    )


def locks(program):
    locked = map_at(4 * PAGE)
    syscall(SYS_MLOCK, locked, 4 * PAGE)
    program.same("mlock", lambda: smaps(locked)[-2:], lambda: syscall(150, locked, 4 * PAGE))
    on_fault = map_at(6 * PAGE, flags=SHARED | ANON)
    syscall(SYS_MLOCK2, on_fault, 6 * PAGE, MLOCK_ONFAULT)
    put(on_fault, b"x")
    program.same(
        "mlock on fault",
        lambda: (get(on_fault, 3), smaps(on_fault)[-1]),
        lambda: syscall(150, on_fault, 6 * PAGE),
    )


def names(program):
    area = map_at(4 * PAGE)
    name = ctypes.create_string_buffer(b"named by us")
    try:
        syscall(157, PR_SET_VMA, PR_SET_VMA_ANON_NAME, area, 4 * PAGE, ctypes.addressof(name))
    except OSError:
        return  # a kernel without CONFIG_ANON_VMA_NAME
    program.same("name", lambda: smaps(area)[3], locking(area, 4 * PAGE))


def files(program):
    path = f"{DIRECTORY}/mapped"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, b"".join(bytes([65 + n]) * PAGE for n in range(16)))
    private = map_at(8 * PAGE, READ | WRITE, PRIVATE, fd, 4 * PAGE)
    put(private + 2 * PAGE, b"changed, private")
    syscall(SYS_MPROTECT, private, 8 * PAGE, READ)
    program.same(
        "file, private, changed, read-only now",
        lambda: (get(private, 8 * PAGE), smaps(private)[1:4]),
        lambda: syscall(SYS_MPROTECT, private, 8 * PAGE, READ | WRITE) or put(private, b"!"),
    )
    shared = map_at(8 * PAGE, READ | WRITE, SHARED, fd, 0)
    put(shared + PAGE, b"changed, shared")

    def through_file():
        put(shared + 3 * PAGE, b"by the mapping")
        with open(path, "rb") as file:
            file.seek(3 * PAGE)
            return file.read(20), get(shared + PAGE, 20), smaps(shared)[1:4]

    def replace():
        syscall(SYS_MMAP, shared, 8 * PAGE, READ | WRITE, PRIVATE | ANON | FIXED, -1, 0)

    program.same("file, shared", through_file, replace)
    beyond = map_at(4 * PAGE, READ, SHARED, fd, 14 * PAGE)  # two pages behind the end of the file
    program.same(
        "beyond the end",
        lambda: [readable(beyond + n * PAGE) for n in range(4)],
        lambda: syscall(SYS_MUNMAP, beyond, 4 * PAGE),
    )
    os.close(fd)

    gone = f"{DIRECTORY}/mapped-and-deleted"
    fd = os.open(gone, os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"without a name" * 1000)
    lost = map_at(3 * PAGE, READ | WRITE, SHARED, fd)
    lost_private = map_at(3 * PAGE, READ | WRITE, PRIVATE, fd)
    put(lost_private + PAGE, b"own")
    os.close(fd)
    os.unlink(gone)

    def both():
        put(lost + 40, b"seen through both")
        return get(lost, 3 * PAGE), get(lost_private, 60), get(lost_private + PAGE, 5)

    program.same("deleted file", both, lambda: put(lost_private + PAGE, b"!"))


def memfds(program):
    fd = os.memfd_create("mapped", 2)
    os.ftruncate(fd, 16 * PAGE)
    first = map_at(16 * PAGE, READ | WRITE, SHARED, fd)
    second = map_at(8 * PAGE, READ, SHARED, fd, 4 * PAGE)
    copy = map_at(8 * PAGE, READ | WRITE, PRIVATE, fd)
    put(copy, b"private to the copy")

    def joined():
        put(first + 4 * PAGE, b"through the first")
        os.pwrite(fd, b"by pwrite", 5 * PAGE)
        return get(second, 20), get(second + PAGE, 10), get(copy, 20), smaps(first)[3], smaps(second)[1]

    program.same("memfd, three times", joined, lambda: put(copy, b"!"))
    only = os.memfd_create("closed", 0)
    os.ftruncate(only, 4 * PAGE)
    alone = map_at(4 * PAGE, READ | WRITE, SHARED, only)
    os.close(only)
    put(alone, b"no descriptor left")
    program.same(
        "memfd without a descriptor", lambda: (get(alone, 20), smaps(alone)[3]), lambda: put(alone, b"!")
    )


def body(program):
    anonymous(program)
    heap(program)
    advice(program)
    locks(program)
    names(program)
    files(program)
    memfds(program)


main(body)
