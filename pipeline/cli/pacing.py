"""The options by which a person says how rounds of pre-copy are paced; `dump` and `migrate` take them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

from pipeline import amounts

_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def duration_s(text: str) -> float:
    """Parse ``300ms``, ``0.3s`` or ``500us`` into seconds; the unit is required, 60 s the most."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration such as 300ms or 0.3s")
    seconds = float(found[1]) * _UNITS_S[found[2]]
    if not 0 < seconds <= 60:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1us and 60s")
    return seconds


def rounds_count(text: str) -> int:
    """Parse a number of rounds, from 1 to 1000."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds from 1 to 1000")
    return int(text)


def add_rounds(parser: argparse.ArgumentParser) -> None:
    """Add --max-downtime and --max-rounds."""
    parser.add_argument(
        "--max-downtime",
        type=duration_s,
        default=0.3,
        metavar="TIME",
        help="how long the tree may stand still at the switch (default: 300ms)",
    )
    parser.add_argument(
        "--max-rounds", type=rounds_count, default=30, metavar="N", help="of pre-copy (default: 30)"
    )


def advice(arguments: argparse.Namespace, figures: Mapping[str, float]) -> str:
    """What to say where a tree stood still for longer than rounds would have taken care of; else empty."""
    downtime_ms = figures["downtime"]
    if arguments.mode != "stop" or downtime_ms <= 1e3 * arguments.max_downtime:
        return ""
    stood = amounts.figure("downtime", downtime_ms)
    return f"it stood still for {stood}; with --mode precopy its memory goes while it runs"
