"""Huge pages of hugetlbfs are what an administrator has set aside: no test does that, and who needs some is skipped."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from pipeline.kernel import hugetlb

HUGE_BYTES = 2 << 20
#: what a program may have at two places at a time, with what its children copy
_NEEDED = {"huge_pages": 80, "huge": 160}


def skip_without(program: str, arguments: Sequence[str] = ()) -> None:
    """Skip a test whose program needs more huge pages than this machine has, for all tests that run side by side."""
    needed = max((_NEEDED.get(name, 0) for name in (program, *arguments)), default=0)
    skip_without_pages(needed * int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def skip_without_pages(needed: int) -> None:
    """Skip a test where so many are not free."""
    if needed and (free := hugetlb.free_pages(HUGE_BYTES)) < needed:
        pytest.skip(f"needs {needed} huge pages of 2 MiB, and {free} are free here (vm.nr_hugepages)")
