"""Asking something inside a namespace: a short-lived child joins it, looks, and answers.

Only the child changes namespaces. It does nothing but system calls between fork and
exit, so that it is safe to fork where other threads run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from pipeline.kernel.syscalls import setns

_CHUNK_BYTES = 1 << 16


def visit(namespaces: Sequence[tuple[int, int]], look: Callable[[], bytes]) -> bytes:
    """Join namespaces in a child and return what `look` returns there.

    Args:
        namespaces: (descriptor, CLONE_NEW* flag), joined in this order.
        look: runs in the child; must not use locks of other threads.

    Raises:
        OSError: joining or looking failed, with the errno.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 255
        try:
            os.close(reader)
            for fd, flag in namespaces:
                setns(fd, flag)
            answer = memoryview(look())
            while answer:
                answer = answer[os.write(writer, answer) :]
            code = 0
        except OSError as error:
            code = min(error.errno or 255, 254)
        finally:
            os._exit(code)
    os.close(writer)
    parts = []
    try:
        while part := os.read(reader, _CHUNK_BYTES):
            parts.append(part)
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code:
        raise OSError(max(0, code), os.strerror(code) if code > 0 else f"killed by signal {-code}")
    return b"".join(parts)
