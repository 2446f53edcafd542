"""MIB MB_A_SECOND [busy] [shared]: a program that writes to its memory, page by page at random, and says how it fares.

On stdout: ``ready``; ``gap MS at TIME`` when it was not let run for longer than 4 ms; and, asked by SIGUSR1,
``checked PAGES wrong PAGES``: every page has its number, how often it was written, and the bytes it began with.
A busy one computes where the other sleeps, and writes so much in a second of its processor time; each 5 ms it says
``did STEPS in SECONDS kernel SECONDS at TIME``: of the processor, and those of them in the kernel. Its memory is
private, or such as it would share with its children.
Standard library only: it runs in a user namespace, and under other tools.
"""

import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from array import array

PAGE = 4096
STAMP = struct.Struct("<QQ")
STEP_S = 0.001
GAP_S = 0.004
TELL_S = 0.005

size, rate, busy = int(sys.argv[1]) << 20, 1e6 * float(sys.argv[2]), "busy" in sys.argv[3:]
kind = mmap.MAP_SHARED if "shared" in sys.argv[3:] else mmap.MAP_PRIVATE
pages = size // PAGE
piece = os.urandom(min(size, 16 << 20))
memory = mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS)
counts = array("Q", bytes(8 * pages))
for begin in range(0, size, len(piece)):
    memory[begin : begin + len(piece)] = piece[: size - begin]
for page in range(pages):
    STAMP.pack_into(memory, page * PAGE, page, 0)
asked = False


def ask(*_):
    global asked
    asked = True


def wrong():
    found = 0
    for page in range(pages):
        at = page * PAGE
        origin = at % len(piece)
        found += (
            STAMP.unpack_from(memory, at) != (page, counts[page])
            or memory[at + STAMP.size : at + PAGE] != piece[origin + STAMP.size : origin + PAGE]
        )
    return found


signal.signal(signal.SIGUSR1, ask)
print("ready", flush=True)
owed, last = 0.0, time.monotonic()
steps, cpu, told = 0, time.process_time(), last
while True:
    if busy:
        used = time.process_time()
        owed += rate * max(0.0, used - cpu) / PAGE  # it begins at 0 where a program has moved to
        cpu = used
    else:
        owed += rate * STEP_S / PAGE
    while owed >= 1:
        owed -= 1
        page = int(random.random() * pages)
        counts[page] += 1
        STAMP.pack_into(memory, page * PAGE, page, counts[page])
    now = time.monotonic()
    if now - last > GAP_S:
        print(f"gap {1e3 * (now - last):.1f} at {time.time():.3f}", flush=True)
    last = now
    if busy:
        sum(range(10_000))
        steps += 1
        if now - told >= TELL_S:
            told = now
            used = resource.getrusage(resource.RUSAGE_SELF)
            print(
                f"did {steps} in {used.ru_utime + used.ru_stime} kernel {used.ru_stime} at {time.time():.3f}",
                flush=True,
            )
    else:
        time.sleep(STEP_S)
    if asked:
        asked = False
        print(f"checked {pages} wrong {wrong()}", flush=True)
        last = time.monotonic()
        cpu = time.process_time()
