"""Bare loops: the least that anybody has to do for the same bytes on the same machine, and nothing else.

Each is what a person would write who only wants the memory of a process somewhere else, in 4 MiB pieces as the engine
does. All return bytes a second.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from pipeline.ids import HostPid, LocalFd
from pipeline.kernel import smaps, uffdio, userfaultfd
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.syscalls import process_vm_readv, syscall
from pipeline.transport import identity

PIECE_BYTES = 4 << 20
_THREADS = 2
_BUFFERS = 4


def largest_mapping(pid: int) -> tuple[int, int]:
    """Address and size of the largest mapping of a process: its memory, where it has but one of note."""
    largest = max(smaps.maps(HostPid(pid)), key=lambda mapping: mapping.end - mapping.start)
    return largest.start, largest.end - largest.start


def dump_rate(pid: int, path: Path) -> float:
    """Two threads: process_vm_readv(2), and pwrite(2) to a new file, which stays."""
    start, size = largest_mapping(pid)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def piece(buffer: memoryview, at: int) -> None:
        count = process_vm_readv(HostPid(pid), [(start + at, min(PIECE_BYTES, size - at))], buffer, 0)
        os.pwrite(fd, buffer[:count], at)

    try:
        return _in_pieces(size, piece)
    finally:
        os.close(fd)


def restore_rate(path: Path) -> float:
    """Two threads: pread(2) of a file into new anonymous memory, in huge pages where the kernel has some."""
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # EINVAL: the kernel has none
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)

    def piece(_: memoryview, at: int) -> None:
        os.preadv(fd, [view[at : at + PIECE_BYTES]], at)

    try:
        return _in_pieces(size, piece)
    finally:
        os.close(fd)
        view.release()
        memory.close()


def _in_pieces(size: int, act: Callable[[memoryview, int], None]) -> float:
    """Let two threads act on the pieces of `size` bytes, each with a buffer of its own."""
    places: Iterator[int] = iter(range(0, size, PIECE_BYTES))
    failed: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(PIECE_BYTES))
        try:
            for at in places:  # `next` of a range is one step: threads do not meet in it
                act(buffer, at)
        except BaseException as error:  # noqa: BLE001 (raised again by who waits)
            failed.append(error)

    begin = time.perf_counter()
    _in_threads([work] * _THREADS)
    if failed:
        raise failed[0]
    return size / (time.perf_counter() - begin)


def send_rate(pid: int) -> float:
    """One thread: process_vm_readv(2), and send(2) over loopback to a process that throws it away."""
    return _sent_rate(pid, _swallow)


def put_rate(pid: int) -> float:
    """The same, to a process that has it as its memory afterwards: one thread receives, one puts it (UFFDIO_COPY)."""
    _, size = largest_mapping(pid)
    return _sent_rate(pid, partial(_put, size))


def _sent_rate(pid: int, take: Callable[[socket.socket], None]) -> float:
    start, size = largest_mapping(pid)
    buffer = memoryview(bytearray(PIECE_BYTES))
    with _sink(1, take) as (writer,):
        begin = time.perf_counter()
        for at in range(0, size, PIECE_BYTES):
            count = process_vm_readv(HostPid(pid), [(start + at, min(PIECE_BYTES, size - at))], buffer, 0)
            writer.sendall(buffer[:count])
        writer.shutdown(socket.SHUT_WR)
        writer.recv(1)  # all of it is taken
        return size / (time.perf_counter() - begin)


def tls_rate(size: int, streams: int) -> float:
    """`streams` connections of the ssl module over loopback, a thread for each; the same bytes again and again."""
    secret = secrets.token_hex(32).encode()
    client = identity.client_context(secret)
    take = partial(_decrypt, identity.server_context(secret))
    with _sink(streams, take) as writers, ExitStack() as stack:
        secure = [stack.enter_context(client.wrap_socket(writer)) for writer in writers]
        buffer = memoryview(os.urandom(PIECE_BYTES))

        def send(over: ssl.SSLSocket) -> None:
            for _ in range(0, size // streams, PIECE_BYTES):
                over.sendall(buffer)

        begin = time.perf_counter()
        _in_threads([partial(send, one) for one in secure])
        return size / (time.perf_counter() - begin)


@contextmanager
def _sink(streams: int, take: Callable[[socket.socket], None]) -> Iterator[list[socket.socket]]:
    """Connections to a process in which a thread for each takes all that comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        child = os.fork()
        if not child:
            try:
                _in_threads([partial(take, listener.accept()[0]) for _ in range(streams)])
            finally:
                os._exit(0)
        try:
            yield [
                stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(streams)
            ]
        finally:
            stack.close()
            os.waitpid(child, 0)


def _in_threads(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _swallow(connection: socket.socket) -> None:
    with connection:
        buffer = bytearray(PIECE_BYTES)
        while connection.recv_into(buffer):
            pass


def _decrypt(context: ssl.SSLContext, connection: socket.socket) -> None:
    _swallow(context.wrap_socket(connection, server_side=True))


def _put(size: int, connection: socket.socket) -> None:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fd = LocalFd(syscall(NR.userfaultfd, userfaultfd.MAKE_FLAGS))
    uffdio.begin(fd)
    uffdio.register(fd, start, start + size, uffdio.MODE.MISSING)
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    filled: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    for _ in range(_BUFFERS):
        free.put(memoryview(bytearray(PIECE_BYTES)))

    def receive() -> None:
        for at in range(0, size, PIECE_BYTES):
            piece = free.get()[: size - at]
            connection.recv_into(piece, len(piece), socket.MSG_WAITALL)
            filled.put(piece)

    def put() -> None:
        for at in range(0, size, PIECE_BYTES):
            piece = filled.get()
            uffdio.copy(fd, start + at, piece)
            free.put(piece)

    with connection:
        _in_threads([receive, put])
