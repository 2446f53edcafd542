"""Memory and processes that change all at once when SIGUSR1 comes: after that nothing is what was stored before."""

import ctypes
import hashlib
import mmap
import os
import signal
import time

from lagging import MREMAP_MAYMOVE, SIZE, digest, filled, fixed, flip, libc, move, taken
from support import main, wait_for


def sleeping(program):
    pid = os.fork()
    if pid == 0:
        signal.pause()
    program.children.append(pid)
    return pid


def executed(pid):
    return os.path.basename(os.readlink(f"/proc/{pid}/exe"))


def body(program):
    rewritten, _ = filled()
    dropped, _ = filled()
    replaced, _ = filled()
    grown, content = filled()
    moved, there = filled()
    shared = mmap.mmap(-1, SIZE)
    shared.write(os.urandom(SIZE))
    truncated = os.memfd_create("truncated")
    os.write(truncated, os.urandom(SIZE))
    runner = sleeping(program)
    ending = sleeping(program)

    def turn(number, frame):
        del number, frame
        ctypes.memmove(rewritten, os.urandom(SIZE // 2), SIZE // 2)
        ctypes.memset(rewritten + SIZE // 2, 0, SIZE // 4)
        libc.madvise(dropped, SIZE, 4)  # MADV_DONTNEED
        fixed(replaced, SIZE)
        ctypes.memset(replaced, 7, SIZE // 4)
        target = taken()
        move(moved, target)
        wider = libc.mremap(grown, SIZE, 2 * SIZE, MREMAP_MAYMOVE, None)
        late, _ = filled()
        shared.seek(SIZE // 2)
        shared.write(os.urandom(SIZE // 4))
        os.ftruncate(truncated, SIZE // 4)
        for pid in (ending, runner):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            program.children.remove(pid)
        other = os.fork()
        if other == 0:
            os.execv("/bin/sleep", ["sleep", "1000"])
        program.children.append(other)
        wait_for(lambda: executed(other) == "sleep", "another program")
        inherited = digest(late)

        def looks():
            assert digest(late) == inherited
            time.sleep(0.01)

        program.busy("child with memory of its parent", looks)
        for name, address in (("rewritten", rewritten), ("dropped", dropped), ("replaced", replaced)):
            same(program, name, address)
        same(program, "moved", target, there)
        same(program, "grown", wider, content)
        same(program, "late", late, inherited)
        program.same("another program", lambda: executed(other), lambda: os.kill(other, signal.SIGKILL))
        program.same(
            "shared",
            lambda: hashlib.sha256(shared[:]).hexdigest(),
            lambda: shared.seek(0) or shared.write(b"?"),
        )
        program.same(
            "truncated",
            lambda: hashlib.sha256(os.pread(truncated, 2 * SIZE, 0)).hexdigest(),
            lambda: os.pwrite(truncated, b"?", 0),
        )
        program.put("turned", "")

    signal.signal(signal.SIGUSR1, turn)


def same(program, name, address, expected=None):
    before = expected or digest(address)
    program.check(
        name,
        lambda: None if digest(address) == before else "it is other memory",
        lambda: flip(address),
    )


if __name__ == "__main__":
    main(body)
