"""Session keyrings with keys: one that parent and child share, one of another child's own."""

import ctypes
import mmap
import os
import struct

from support import main, syscall, wait_for

ADD_KEY, KEYCTL = 248, 250
GET_KEYRING_ID, JOIN_SESSION_KEYRING, SETPERM, DESCRIBE, READ = 0, 1, 5, 6, 11
SESSION = -3


def read(serial, operation=READ):
    buffer = ctypes.create_string_buffer(4096)
    size = syscall(KEYCTL, operation, serial, buffer, 4096)
    return buffer.raw[:size]


def add(name, payload, permissions):
    buffer = ctypes.create_string_buffer(payload, len(payload))
    serial = syscall(ADD_KEY, b"user\0", name + b"\0", buffer, len(payload), SESSION)
    syscall(KEYCTL, SETPERM, serial, permissions)
    return serial


def everything():
    """The session keyring and its keys, without their numbers."""
    serials = [serial for (serial,) in struct.iter_unpack("<i", read(SESSION))]
    return read(SESSION, DESCRIBE), [(read(serial, DESCRIBE), read(serial)) for serial in serials]


def session(program):
    program.same("keys", everything, lambda: add(b"spoilt", b"x", 0x3F3F0000))


def number():
    return syscall(KEYCTL, GET_KEYRING_ID, SESSION, 0)


def same_as(program, board, mine, other):
    """Both write which keyring they have, in rounds, and compare."""

    def run():
        done, _ = struct.unpack_from("<2q", board, 16 * mine)
        struct.pack_into("<2q", board, 16 * mine, done + 1, number())
        wait_for(lambda: struct.unpack_from("<2q", board, 16 * other)[0] > done, "the other one")
        theirs = struct.unpack_from("<2q", board, 16 * other)[1]
        return None if theirs == number() else f"{number()} here, {theirs} there"

    program.check("shared", run, lambda: syscall(KEYCTL, JOIN_SESSION_KEYRING, None))


def body(program):
    syscall(KEYCTL, JOIN_SESSION_KEYRING, None)
    add(b"invocation_id", bytes(range(16)), 0x0B0B0000)
    add(b"another", b"payload", 0x3F010000)
    board = mmap.mmap(-1, 4096)

    def kin(child):
        session(child)
        same_as(child, board, 1, 0)

    def apart(child):
        syscall(KEYCTL, JOIN_SESSION_KEYRING, None)
        add(b"own", b"\0\1", 0x3F3F0000)
        os.setresgid(7, 7, 7)
        os.setresuid(5, 5, 5)
        add(b"of another user", b"z" * 1000, 0x3F000000)
        session(child)

    program.child("kin", kin)
    program.child("apart", apart)
    session(program)
    same_as(program, board, 0, 1)


main(body)
