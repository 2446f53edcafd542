"""Memory and processes that change all at once when SIGUSR1 comes: after that nothing is what was stored before."""

import ctypes
import hashlib
import mmap
import os
import signal
import time

from lagging import MREMAP_MAYMOVE, SIZE, digest, filled, fixed, flip, libc, move, taken
from support import main, wait_for

MADV_DONTNEED = 4


def sleeping(program):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    program.children.append(pid)
    return pid


def executed(pid):
    return os.path.basename(os.readlink(f"/proc/{pid}/exe"))


class Memory:
    """A piece of memory by name, wherever it is, and what has to be in it."""

    def __init__(self, program, name):
        self.address, self.digest = filled()
        program.check(
            name,
            lambda: None if digest(self.address) == self.digest else "it is other memory",
            lambda: flip(self.address),
        )

    def is_right(self):
        """What is in it now is what has to be in it."""
        self.digest = digest(self.address)


def body(program):
    rewritten, dropped, replaced, grown, moved = (
        Memory(program, name) for name in ("rewritten", "dropped", "replaced", "grown", "moved")
    )
    shared = mmap.mmap(-1, SIZE)
    shared.write(os.urandom(SIZE))
    truncated = os.memfd_create("truncated")
    os.write(truncated, os.urandom(SIZE))
    objects = {
        "shared": lambda: hashlib.sha256(shared[:]).hexdigest(),
        "truncated": lambda: hashlib.sha256(os.pread(truncated, 2 * SIZE, 0)).hexdigest(),
    }
    expected = {name: get() for name, get in objects.items()}

    def changed(name):
        return None if objects[name]() == expected[name] else "it has other content"

    program.check(
        "shared", lambda: changed("shared"), lambda: flip(ctypes.addressof(ctypes.c_char.from_buffer(shared)))
    )
    program.check("truncated", lambda: changed("truncated"), lambda: os.pwrite(truncated, b"?" * 64, 0))
    runner, ending = sleeping(program), sleeping(program)

    def turn(number, frame):
        del number, frame
        ctypes.memmove(rewritten.address, os.urandom(SIZE // 2), SIZE // 2)
        ctypes.memset(rewritten.address + SIZE // 2, 0, SIZE // 4)
        libc.madvise(dropped.address, SIZE, MADV_DONTNEED)
        fixed(replaced.address, SIZE)
        ctypes.memset(replaced.address, 7, SIZE // 4)
        for memory in (rewritten, dropped, replaced):
            memory.is_right()
        target = taken()
        move(moved.address, target)
        moved.address = target
        grown.address = libc.mremap(grown.address, SIZE, 2 * SIZE, MREMAP_MAYMOVE, None)
        late = Memory(program, "late")
        shared.seek(SIZE // 2)
        shared.write(os.urandom(SIZE // 4))
        os.ftruncate(truncated, SIZE // 4)
        expected.update({name: get() for name, get in objects.items()})
        for pid in (ending, runner):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            program.children.remove(pid)
        other = os.fork()
        if other == 0:
            os.execv("/bin/sleep", ["sleep", "1000"])
        program.children.append(other)
        wait_for(lambda: executed(other) == "sleep", "another program")
        program.same("another program", lambda: executed(other), lambda: os.kill(other, signal.SIGKILL))

        def looks():
            assert digest(late.address) == late.digest
            time.sleep(0.01)

        program.busy("child with memory of its parent", looks)
        program.put("turned", "")

    signal.signal(signal.SIGUSR1, turn)


if __name__ == "__main__":
    main(body)
