"""Many threads and many processes, as many as the arguments say: each goes on counting in a place of its own."""

import mmap
import os
import signal
import struct
import sys
import threading
import time

from support import main, wait_for

SLOT = struct.Struct("<Q")


def count(slots, number, pause_s):
    while True:
        value = SLOT.unpack_from(slots, number * SLOT.size)[0] + 1
        SLOT.pack_into(slots, number * SLOT.size, value)
        time.sleep(pause_s)


def body(program):
    threads, processes = (int(word) for word in sys.argv[2:4]) if len(sys.argv) > 3 else (12, 8)
    everybody = threads + processes
    slots = mmap.mmap(-1, (everybody + 1) * SLOT.size)
    threading.stack_size(256 * 1024)
    pause_s = max(0.02, everybody / 2000)  # a machine of two processors has better things to do

    def all_count():
        before = [SLOT.unpack_from(slots, n * SLOT.size)[0] for n in range(everybody)]

        def behind():
            return [n for n in range(everybody) if SLOT.unpack_from(slots, n * SLOT.size)[0] == before[n]]

        deadline = time.monotonic() + 3 + 30 * pause_s
        while (still := behind()) and time.monotonic() < deadline:
            time.sleep(pause_s / 2)
        return f"{len(still)} of {everybody} stand still, the first is {still[0]}" if still else None

    pids = []
    for number in range(processes):
        pid = os.fork()
        if pid == 0:
            count(slots, number, pause_s)
        pids.append(pid)
    program.children += pids
    for number in range(processes, everybody):
        threading.Thread(target=count, args=(slots, number, pause_s), daemon=True).start()
    wait_for(lambda: len(os.listdir("/proc/self/task")) == threads + 1, "the threads", 20)
    program.check("all count", all_count, lambda: os.kill(pids[0], signal.SIGKILL))
    program.same(
        "numbers",
        lambda: sorted(os.listdir("/proc/self/task")),
        lambda: threading.Thread(target=time.sleep, args=(100,), daemon=True).start(),
    )


main(body)
