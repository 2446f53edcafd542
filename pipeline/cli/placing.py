"""The options that say where the ids of a tree lie at the destination; of restore and serve."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --map and --unmapped."""
    parser.add_argument(
        "--map",
        default="same",
        metavar="same|auto|BASE:COUNT",
        help="where the ids that the tree's outermost user namespaces map to lie here: where they lay (default), in "
        "the ranges that subuid(5) gives this user, or in COUNT ids from BASE on, such as 200000:65536",
    )
    parser.add_argument(
        "--unmapped",
        choices=("refuse", "overflow"),
        default="refuse",
        help="ids of the tree that have no place here: refuse and name them (default), or let the overflow id "
        "(65534) stand for them",
    )
