"""Remove what commands left behind: partial images, temporary directories, locks of connections that no image needs.

Nothing of a running command is touched. Processes need no cleaning: what a killed
command had half built dies with it, and what it was looking at runs on.
"""

from __future__ import annotations

import argparse

from pipeline import leftovers
from pipeline.resources import tcp_lock

EXAMPLE = "  python -m pipeline clean"


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def execute(_arguments: argparse.Namespace) -> int:
    found = [(item.path, item.removed, item.reason) for item in leftovers.sweep()]
    found += [(f"nftables table {item.table}", item.removed, item.reason) for item in tcp_lock.sweep()]
    for what, removed, reason in found:
        print(f"{'removed' if removed else 'kept'} {what}: {reason}")
    if not found:
        print("nothing was left behind")
    return 0
