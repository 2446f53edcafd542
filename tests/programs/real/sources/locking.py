"""Holds a lock of each kind on a file of its own, for writing, and counts."""

import fcntl
import os
import struct
import time

FLOCK = struct.Struct("<hh4xqqi4x")
F_OFD_SETLK = 37

files = {name: os.open(name, os.O_RDWR | os.O_CREAT, 0o666) for name in ("flock", "ofd", "posix")}
for name in files:
    os.chmod(name, 0o666)
fcntl.flock(files["flock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
fcntl.fcntl(files["ofd"], F_OFD_SETLK, FLOCK.pack(fcntl.F_WRLCK, 0, 10, 5, 0))
fcntl.lockf(files["posix"], fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 10)
number = 0
while True:
    number += 1
    with open("counts", "a") as out:
        out.write(f"{number}\n")
    time.sleep(0.01)
