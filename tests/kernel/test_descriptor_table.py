"""Room in the table of descriptors."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import resource, threading
from pipeline.kernel import descriptor_table
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 256), hard))
{before}
descriptor_table.make_room_first()
descriptor_table.make_room(5)
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("FDSize")))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0] == hard, hard)
"""


def _size(before: str = "") -> tuple[int, bool, int]:
    found = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(before=before)], capture_output=True, text=True, check=True
    )
    size, raised, hard = found.stdout.split()
    return int(size), raised == "True", int(hard)


def test_room_is_made_as_far_as_the_limit_goes() -> None:
    size, raised, hard = _size()
    assert raised
    assert size >= min(2048, hard)


def test_a_lower_hard_limit_is_kept_to() -> None:
    size, raised, hard = _size("resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); hard = 256")
    assert (raised, hard) == (True, 256)
    assert size == 256
