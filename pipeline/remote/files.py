"""Files that somebody else has to write: the kernel asks who opens them.

Source: user_namespaces(7) on who may write a map.
"""

from __future__ import annotations

import os

from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.puppet import Puppet


def put(writer: Puppet, path: str, text: bytes) -> None:
    """Let a puppet write a file of /proc, in one write.

    Args:
        path: as the puppet sees it.

    Raises:
        OSError: what the kernel says.
    """
    fd = writer.syscall(NR.openat, -100, path.encode() + b"\0", os.O_WRONLY | os.O_CLOEXEC, 0)
    try:
        writer.syscall(NR.write, fd, text, len(text))
    finally:
        writer.syscall(NR.close, fd)
