"""Remove what commands that were killed left behind: partial images and temporary directories.

Nothing of a running command is touched. Processes need no cleaning: what a killed
command had half built dies with it, and what it was looking at runs on.
"""

from __future__ import annotations

import argparse

from pipeline import leftovers

EXAMPLE = "  python -m pipeline clean"


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def execute(_arguments: argparse.Namespace) -> int:
    found = leftovers.sweep()
    for item in found:
        print(f"{'removed' if item.removed else 'kept'} {item.path}: {item.reason}")
    if not found:
        print("nothing was left behind")
    return 0
