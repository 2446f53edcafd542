"""System V shared memory, semaphores with adjustments, and message queues, in an ipc namespace of its own.

Needs CAP_SYS_ADMIN in its user namespace.
"""

import ctypes
import os
import signal
import struct
import threading

from support import libc, main, wait_for

CLONE_NEWIPC = 0x08000000
PRIVATE, CREAT, EXCL = 0, 0o1000, 0o2000
RMID, SET, STAT, GETVAL, SETALL, GETALL, LOCK = 0, 1, 2, 12, 17, 13, 11
UNDO, NOWAIT, RDONLY = 0x1000, 0o4000, 0o10000
PAGE = 4096
SHMGET, SHMAT, SHMCTL, SEMGET, SEMOP, SEMCTL, SHMDT, MSGGET, MSGSND, MSGRCV, MSGCTL = (
    29,
    30,
    31,
    *range(64, 72),
)
READ, WRITE = 1, 2
WHERE = 0x7_0000_0000


def call(number, *args):
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = libc.syscall(ctypes.c_long(number), *values)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def stat(number, size, *args):
    buffer = ctypes.create_string_buffer(size)
    call(number, *args, STAT, buffer)
    return buffer.raw


def perm(raw):
    """key, uid, gid, cuid, cgid, mode"""
    return struct.unpack_from("<i5I", raw)


def segment(identifier):
    raw = stat(SHMCTL, 112, identifier)
    return perm(raw), struct.unpack_from("<Q", raw, 48)[0], struct.unpack_from("<Q", raw, 88)[0]


def semaphores(identifier, count):
    values = ctypes.create_string_buffer(2 * count)
    call(SEMCTL, identifier, 0, GETALL, values)
    return perm(stat(SEMCTL, 104, identifier, 0)), struct.unpack(f"<{count}H", values.raw)


def operate(identifier, *operations):
    call(SEMOP, identifier, b"".join(struct.pack("<Hhh", *one) for one in operations), len(operations))


def queue(identifier):
    raw = stat(MSGCTL, 120, identifier)
    return perm(raw), struct.unpack_from("<3Q", raw, 72)


def receive(identifier, kind=0):
    buffer = ctypes.create_string_buffer(1 << 16)
    size = call(MSGRCV, identifier, buffer, len(buffer) - 8, kind, NOWAIT)
    return struct.unpack_from("<q", buffer.raw)[0], buffer.raw[8 : 8 + size]


def send(identifier, kind, text):
    call(MSGSND, identifier, struct.pack("<q", kind) + text, len(text), NOWAIT)


def mapped():
    """Mappings of segments: addresses, permissions, offsets, identifiers. (The key in the name of one that was
    removed is the kernel's memory only.)"""
    with open("/proc/self/maps") as file:
        return [line.split()[:3] + line.split()[4:5] for line in file if "/SYSV" in line]


def protect(address, protection):
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), protection):
        raise OSError(ctypes.get_errno(), "mprotect")


def other_id():
    """An id that is mapped here besides ours, if there is one."""
    with open("/proc/self/uid_map") as file:
        first, _, count = map(int, file.readline().split())
    return first + 5 if count > 5 else os.getuid()


def shared_memory(program):
    size = 300 * PAGE + 100
    first = call(SHMGET, 0x1234, size, CREAT | EXCL | 0o640)
    data = os.urandom(3 * PAGE)
    at = call(SHMAT, first, WHERE, 0)
    ctypes.memmove(at + 7 * PAGE + 5, data, len(data))

    changed = call(SHMGET, PRIVATE, PAGE, 0o600)
    raw = bytearray(stat(SHMCTL, 112, changed))
    struct.pack_into("<2I", raw, 4, other_id(), other_id())
    struct.pack_into("<I", raw, 20, 0o604)
    call(SHMCTL, changed, SET, bytes(raw))

    gone = call(SHMGET, 0x77, 8 * PAGE, CREAT | 0o600)
    end = call(SHMAT, gone, WHERE + (1 << 24), 0)
    ctypes.memmove(end, b"until the last one goes", 23)
    again = call(SHMAT, gone, WHERE + (2 << 24), RDONLY)
    call(SHMCTL, gone, RMID, 0)
    libc.munmap(ctypes.c_void_p(end + 2 * PAGE), ctypes.c_size_t(PAGE))
    protect(end + 4 * PAGE, READ)

    def both():
        ctypes.memmove(end + 30, b"seen at the other", 17)
        return ctypes.string_at(end, 23), ctypes.string_at(again + 30, 17), segment(gone)

    def checks():
        program.same(
            "segment: bytes",
            lambda: ctypes.string_at(at, size),
            lambda: ctypes.memmove(at + 299 * PAGE, b"!", 1),
        )
        program.same("segment: what it is", lambda: segment(first), lambda: call(SHMCTL, first, RMID, 0))
        program.same(
            "segment that nobody has attached",
            lambda: segment(changed),
            lambda: call(SHMCTL, changed, RMID, 0),
        )
        program.same("removed segment", both, lambda: ctypes.memmove(end, b"!", 1))
        program.same("mappings", mapped, lambda: protect(at + PAGE, READ))

    return checks


def adjustments(program, identifier, wait, act):
    """A child that has adjustments, and what its end makes of the values."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        for address, *_ in {tuple(one[:1]) for one in mapped() if one[2] == "0" * 8}:
            call(SHMDT, int(address.split("-")[0], 16))
        act()
        os.write(wait, b"x")
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    return pid, writer


def semaphore_sets(program):
    identifier = call(SEMGET, 0x99, 4, CREAT | EXCL | 0o666)
    call(SEMCTL, identifier, 0, SETALL, struct.pack("<4H", 3, 0, 32767, 100))
    told, tell = os.pipe()

    def act():
        operate(identifier, (0, 5, UNDO), (3, -40, UNDO))
        operate(identifier, (2, -32767, UNDO))
        operate(identifier, (1, 1, UNDO), (1, -1, UNDO))
        thread = threading.Thread(target=lambda: operate(identifier, (1, 9, UNDO)))
        thread.start()
        thread.join()

    pid, end = adjustments(program, identifier, tell, act)
    os.read(told, 1)
    operate(identifier, (3, 1, UNDO))

    def undone():
        """What is left when the child has ended; asked once."""
        if not left:
            now = semaphores(identifier, 4)
            if now != before:
                return f"before: was {before}, is {now}"
            os.write(end, b"x")
            os.waitpid(pid, 0)
            left.append(semaphores(identifier, 4)[1])
        return None if left[0] == (3, 0, 32767, 101) else f"is {left[0]}"

    left, before = [], semaphores(identifier, 4)

    def spoil():
        left[:] = [(0, 0, 0, 0)]

    return undone, spoil


def message_queues(program):
    identifier = call(MSGGET, 0x55, CREAT | EXCL | 0o620)
    raw = bytearray(stat(MSGCTL, 120, identifier))
    struct.pack_into("<Q", raw, 88, 5000)
    call(MSGCTL, identifier, SET, bytes(raw))
    for kind, text in ((5, b"first of five"), (2, b""), (5, bytes(range(256)) * 4), (1 << 40, b"wide")):
        send(identifier, kind, text)

    def through():
        """Take all and put it back."""
        found = [receive(identifier) for _ in range(queue(identifier)[1][1])]
        for message in found:
            send(identifier, *message)
        return found, queue(identifier)

    program.same("messages", through, lambda: receive(identifier))
    empty = call(MSGGET, PRIVATE, 0o600)
    program.same("empty queue", lambda: queue(empty), lambda: call(MSGCTL, empty, RMID, 0))


def waits_for_a_message(program):
    """A child that sleeps in msgrcv(2) gets the message that is sent later."""
    identifier = call(MSGGET, PRIVATE, 0o600)
    reply, answer = os.pipe()
    pid = os.fork()
    if pid == 0:
        buffer = ctypes.create_string_buffer(100)
        while True:
            size = call(MSGRCV, identifier, buffer, 92, 0, 0)
            os.write(answer, buffer.raw[8 : 8 + size])
    program.children.append(pid)
    os.close(answer)

    def asleep():
        with open(f"/proc/{pid}/syscall") as file:
            return file.read().split()[0] == str(MSGRCV)

    wait_for(asleep, "a child in msgrcv")

    def talks():
        send(identifier, 1, b"wake up")
        return os.read(reply, 100)

    program.same("sleeper", talks, lambda: os.kill(pid, signal.SIGKILL) or os.waitpid(pid, 0))


def attached_child(program):
    """A child that has inherited the attachments, less one."""
    call(SHMDT, WHERE + (2 << 24))
    program.same(
        "inherited",
        lambda: (mapped(), ctypes.string_at(WHERE, 8 * PAGE)),
        lambda: protect(WHERE + 2 * PAGE, READ),
    )


def come_and_go():
    """Objects that are there for a moment only, and nothing that /proc shows of the process."""
    one = call(SHMGET, PRIVATE, 4 * PAGE, 0o600)
    two, three = call(SEMGET, PRIVATE, 1, 0o600), call(MSGGET, PRIVATE, 0o600)
    send(three, 1, b"soon gone")
    assert receive(three)[1] == b"soon gone"
    call(SHMCTL, one, RMID, 0)
    call(SEMCTL, two, 0, RMID, 0)
    call(MSGCTL, three, RMID, 0)


def body(program):
    if libc.unshare(CLONE_NEWIPC):
        raise OSError(ctypes.get_errno(), "unshare")
    checks = shared_memory(program)
    undone = semaphore_sets(program)
    message_queues(program)
    waits_for_a_message(program)
    program.child("attached", attached_child)
    program.busy("objects come and go", come_and_go)
    program.check("undone", *undone)
    checks()


main(body)
