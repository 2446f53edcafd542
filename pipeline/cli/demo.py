"""Move a running tree between two hosts that are made on this machine.

The tree spans three levels of user namespaces, with threads, pipes and sockets between
them, and an http.server that is asked all the while. As root the hosts have network,
pid and mount namespaces of their own, joined by a cable; a plain user gets what a
plain user may have, and is told so. Everything is taken away again at the end.
"""

from __future__ import annotations

import argparse

EXAMPLE = "  python -m pipeline demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", action="store_true", help="the checks and figures as one JSON document on stdout"
    )


def execute(arguments: argparse.Namespace) -> int:
    from pipeline.demo import show

    return show.main(json=arguments.json)
