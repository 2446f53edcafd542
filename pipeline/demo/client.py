"""Asks the tree's web server all the while, from outside the tree: short requests, tried again when one fails.

Writes what it saw as JSON when it is told to end (SIGTERM). Needs nothing but the
standard library.
"""

from __future__ import annotations

import http.client
import json
import signal
import sys
import time
from pathlib import Path

PAUSE_S = 0.05
RETRY_S = 0.01
PATIENCE_S = 0.5


def ask(address: str, port: int) -> bytes:
    """One request on one connection; OSError or HTTPException if nobody answers in time."""
    connection = http.client.HTTPConnection(address, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/greeting")
        return connection.getresponse().read()
    finally:
        connection.close()


def main(address: str, port: int, greeting: str, result: Path) -> None:
    """Ask until SIGTERM; `greeting` is the only right answer."""
    running = True

    def stop(_number: int, _frame: object) -> None:
        nonlocal running
        running = False

    signal.signal(signal.SIGTERM, stop)
    answered = wrong = tried_again = 0
    longest_s, last_s = 0.0, None
    while running:
        try:
            answer = ask(address, port)
        except (OSError, http.client.HTTPException):
            # before the first answer the server is still starting
            tried_again += last_s is not None
            time.sleep(RETRY_S)
            continue
        now_s = time.monotonic()
        answered += 1
        wrong += answer != greeting.encode()
        if last_s is not None:
            longest_s = max(longest_s, now_s - last_s)
        last_s = now_s
        if answered == 1:
            result.with_suffix(".ready").touch()
        time.sleep(PAUSE_S)
    seen = {"answered": answered, "wrong": wrong, "tried-again": tried_again, "longest-pause-s": longest_s}
    result.write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
