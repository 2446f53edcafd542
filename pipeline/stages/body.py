"""Giving a puppet its namespaces and its memory: what `Growth` calls for `Become` and `Inherit`.

Become: ids that only exist further out, namespaces, then a fresh address space. The
program is executed *inside* the final user namespace, because the kernel ties an
address space to the user namespace it was made in. execve drops the capabilities of
whoever is not root there, and a map may have no root, so they are carried over as
ambient ones and laid off again.

Inherit: namespaces, then only what differs from the parent's mappings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from pipeline.errors import RebuildError
from pipeline.ids import LocalFd, RemoteFd
from pipeline.image.codec import Image
from pipeline.image.schema import AddressSpace, MappedFile, PathRef, Process
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import PRCTL
from pipeline.ledger import LEDGER
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet
from pipeline.resources.memory import rebuild
from pipeline.resources.memory.rebuild import Source
from pipeline.stages import memory_layout
from pipeline.stages.contents import Contents
from pipeline.stages.growth import Grown

_CAPABILITY_VERSION_3 = 0x20080522
_AMBIENT_RAISE = 2
_AMBIENT_CLEAR_ALL = 4
_LAST_CAPABILITY = 40


def _capabilities(inheritable: bool) -> Call:
    """capset: all permitted and effective ones, inheritable or not."""
    every = (1 << (_LAST_CAPABILITY + 1)) - 1
    low, high = every & 0xFFFF_FFFF, every >> 32
    words = (low, low, low if inheritable else 0, high, high, high if inheritable else 0)
    header = _CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
    return Call(NR.capset, (header, b"".join(word.to_bytes(4, "little") for word in words)), name="capset")
