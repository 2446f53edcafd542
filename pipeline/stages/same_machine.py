"""What registers and code of a tree rely on has to be here as it was: the processor's state, and the kernel's vdso."""

from __future__ import annotations

import os

from pipeline.errors import RebuildError
from pipeline.image.schema import Head
from pipeline.kernel import ptrace
from pipeline.kernel.arch import x86_64 as arch
from pipeline.remote.puppet import Puppet
from pipeline.stages import memory_layout


def check(head: Head, launcher: Puppet) -> None:
    """Compare what the source has said with what a process of this host has.

    Raises:
        RebuildError: says what differs.
    """
    xstate = ptrace.get_xstate(launcher.tid)
    missing = head.xfeatures & ~arch.xfeatures(xstate)
    if missing or head.xstate_size_bytes != len(xstate):
        raise RebuildError(
            f"this processor keeps other extended state than the source's (XCR0 {arch.xfeatures(xstate):#x} "
            f"in {len(xstate)} bytes; the tree has {head.xfeatures:#x} in {head.xstate_size_bytes})"
        )
    vdso = memory_layout.kernel_mappings(launcher.pid).get("vdso")
    if any(head.vdso) and head.vdso != memory_layout.vdso_digest(launcher.pid, vdso):
        raise RebuildError(
            f"the vdso of this kernel ({os.uname().release}) is not that of the source's ({head.kernel}); "
            "code of the tree holds addresses in it: restore under the same kernel build"
        )
