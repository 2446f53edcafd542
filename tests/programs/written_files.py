"""A file that is mapped and written to all the time, by the mapping and by write(2): it is newer at each look."""

import mmap
import os
import time

from support import DIRECTORY, main

PAGE = 4096


def number(data):
    return int.from_bytes(data, "little")


def body(program):
    fd = os.open(f"{DIRECTORY}/written", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    os.ftruncate(fd, 2 * PAGE)
    state = {"memory": mmap.mmap(fd, 2 * PAGE)}

    def write():
        memory = state["memory"]
        after = (number(memory[:8]) + 1).to_bytes(8, "little")
        memory[:8] = after
        os.pwrite(fd, after, PAGE)
        time.sleep(0.002)

    program.busy("goes on writing", write)

    def same():
        """What the mapping shows lies between two reads of the file."""
        for at in (0, PAGE):
            before = number(os.pread(fd, 8, at))
            seen = number(state["memory"][at : at + 8])
            after = number(os.pread(fd, 8, at))
            if not 0 < before <= seen <= after:
                return f"at {at}: the file had {before}, then {after}, and the mapping {seen}"
        return None

    def lose():
        state["memory"] = bytes(2 * PAGE)

    program.check("mapping and file are one", same, lose)


main(body)
