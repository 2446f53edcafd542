"""What Python does for the first time while a tree stands still: imports, and text that is compiled.

As a program: the command line of the pipeline, which says at its end what that was: at the source from the freeze to
the end of the look, at a destination from the records of a tree that stands still to its last page.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from pipeline import arriving, standstill
from pipeline.stages import freeze

#: what is told where there was nothing
NONE = "at first: []"

_firsts: list[str] = []
_is_still = False


def _hear(event: str, args: tuple[object, ...]) -> None:
    if _is_still and event in ("import", "compile"):
        _firsts.append(f"{event} {args[0]!r}")


def _beginning(act: Callable[..., Any]) -> Callable[..., Any]:
    def begun(*args: Any) -> Any:
        global _is_still
        _is_still = True
        return act(*args)

    return begun


def _ending(act: Callable[..., Any]) -> Callable[..., Any]:
    def ended(*args: Any) -> Any:
        global _is_still
        try:
            return act(*args)
        finally:
            _is_still = False

    return ended


if __name__ == "__main__":
    from pipeline.cli.main import main

    rest = arriving._come_to_rest

    async def come_to_rest(*args: Any) -> Any:
        global _is_still
        _is_still = True
        try:
            return await rest(*args)
        finally:
            _is_still = False

    sys.addaudithook(_hear)
    freeze.freeze, standstill._capture = _beginning(freeze.freeze), _ending(standstill._capture)
    arriving._come_to_rest = come_to_rest
    try:
        code = main()
    finally:
        print("at first:", _firsts)
    sys.exit(code)
