"""Python's collector of cycles, held off while a tree stands still.

It begins when enough objects were made, and looks at all that there are: longer, at times, than everything else that is
done in a pause takes. What is not in a cycle is freed as ever.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_holders = 0
_was_enabled = False


@contextmanager
def held_off() -> Iterator[None]:
    """No collection by itself in the block; blocks may overlap, in any number of threads."""
    global _holders, _was_enabled
    with _LOCK:
        if not _holders:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _LOCK:
            _holders -= 1
            if not _holders and _was_enabled:
                gc.enable()
