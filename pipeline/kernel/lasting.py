"""Memory that outlives its process: a read of it that stays in the kernel until it is let go.

A process that is killed gives back its memory before its files and everything else, a gigabyte in 0.1 s. But memory
that somebody reads by /proc/PID/mem is in use until the read returns; so the process ends at once, and who gives the
memory back is the thread that reads. The read does not return because the page that it reads into is missing, and a
userfaultfd has nobody who would bring it.

With the memory stay, and end later, the mappings of files: locks and leases that belong to their descriptions, and what
some file systems write when a shared mapping ends (FUSE, 9P).

Who has CAP_SYS_PTRACE in the initial user namespace may do so, or everybody by vm.unprivileged_userfaultfd.

Source: fs/proc/base.c (mem_rw), kernel/exit.c (do_exit), fs/userfaultfd.c (handle_userfault).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress

from pipeline.ids import HostPid, LocalFd, RemoteAddress
from pipeline.kernel import uffdio
from pipeline.kernel.arch.x86_64_numbers import NR
from pipeline.kernel.inside import open_file
from pipeline.kernel.pagemap import PAGE_BYTES, Range
from pipeline.kernel.syscalls import syscall
from pipeline.kernel.uffdio import MODE
from pipeline.ledger import LEDGER

#: how long the read may take to come to its missing page
_BEGIN_MS = 200


class LastingMemory:
    """The memory of a process lasts until `close`, which gives it back if the process has ended; it can be read.

    Args:
        pid: the process.
        address: of a page that it has.

    Raises:
        OSError: EPERM: not for this user; ETIMEDOUT: the page cannot be read.

    Ownership: holds a thread, which ends in `close`, and with us.
    """

    def __init__(self, pid: HostPid, address: RemoteAddress) -> None:
        self._pid = pid
        self._page = mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._thread = threading.Thread(target=self._read, args=(address,), name="lasting", daemon=True)
        self._memory = LocalFd(-1)
        self._fault = LocalFd(syscall(NR.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK))
        self._key = self._fault  # a memory may be held more than once
        LEDGER.take("lasting memory", self._key)
        try:
            uffdio.begin(self._fault)
            uffdio.register(self._fault, *self._range(), MODE.MISSING)
            self._memory = open_file(pid, "mem", os.O_RDONLY)
            self._thread.start()
            waiting = select.poll()
            waiting.register(self._fault, select.POLLIN)
            if not waiting.poll(_BEGIN_MS):
                raise TimeoutError(errno.ETIMEDOUT, f"pid {pid}: its memory cannot be read at {address:#x}")
        except BaseException:
            self.close()
            raise

    def _range(self) -> Range:
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        return start, start + PAGE_BYTES

    def _read(self, address: RemoteAddress) -> None:
        # a signal would have the kernel try again and again
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with suppress(OSError):  # there is no such page
            os.preadv(self._memory, [self._page], address)

    def read(self, segments: Sequence[tuple[int, int]], buffer: memoryview) -> int:
        """Read pages that the process had, also when it has ended, one behind the other; returns their bytes.

        Args:
            segments: address and length in bytes of each.

        Raises:
            OSError: EIO: nothing is mapped there.
        """
        done = 0
        for address, length in segments:
            view = buffer[done : done + length]
            while view:
                count = os.preadv(self._memory, [view], address)
                if not count:
                    raise OSError(errno.EIO, f"the memory of pid {self._pid} is gone")
                view = view[count:]
                address += count
            done += length
        return done

    def close(self) -> None:
        """Let the read return, and give the memory back if nobody else uses it, which takes its time; idempotent."""
        if self._fault < 0:
            return
        fault, self._fault = self._fault, LocalFd(-1)
        # not by closing alone: a child that was forked meanwhile may have a duplicate
        with suppress(OSError):  # it was not registered
            uffdio.unregister(fault, *self._range())
        os.close(fault)
        if self._thread.ident is not None:
            self._thread.join()
        if self._memory >= 0:
            os.close(self._memory)
        LEDGER.give_back("lasting memory", self._key)
