"""A small program with one file open and one mapped: what is at stake when something goes wrong."""

import mmap
import os

from support import DIRECTORY, main


def body(program):
    read_from = os.open(f"{DIRECTORY}/open", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(read_from, b"open file " * 100)
    os.lseek(read_from, 10, os.SEEK_SET)
    with open(f"{DIRECTORY}/mapped", "wb+") as file:
        file.write(b"mapped file " * 1000)
        file.flush()
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    counters = {"rounds": 0}
    program.same(
        "open file",
        lambda: (os.lseek(read_from, 0, 1), os.pread(read_from, 20, 0)),
        lambda: os.lseek(read_from, 0, 0),
    )

    def mapping():
        counters["rounds"] += 1
        return mapped[:20], counters.get("broken")

    program.same("mapped file", mapping, lambda: counters.update(broken=1))


main(body)
