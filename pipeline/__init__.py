"""Checkpoint, restore and live migration of Linux process trees in nested user namespaces.

The public API is what the commands use: `dump`, `restore`, `migrate`, `serve`,
`check` and `inspect` are async functions for Trio. `pipeline.blocking` offers the
same to plain code, `pipeline.aio` to asyncio.

Nothing heavy is imported until a name is used: starting the interpreter is part
of a command's time. Each recipe lives in a module of its own name, so that
``pipeline.dump`` could mean the module or the function; it always means the
function (``from pipeline.dump import DumpResult`` finds the module all the same).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# msgspec imports it when it begins, and if ^C comes just then, goes on without it until it crashes
importlib.import_module("datetime")

if TYPE_CHECKING:
    from pipeline.check import CheckReport, check
    from pipeline.dump import DumpResult, dump
    from pipeline.errors import (
        Blocker,
        ImageError,
        InDoubt,
        PeerError,
        PipelineError,
        RebuildError,
        Refused,
        StorageError,
        TargetError,
        UsageError,
    )
    from pipeline.inspect import Inspection, inspect
    from pipeline.migrate import MigrateResult, migrate
    from pipeline.policy import DumpPolicy, RestorePolicy
    from pipeline.progress import NullProgress, Progress, Round
    from pipeline.restore import RestoredTree, restore
    from pipeline.serve import serve

__version__ = "0.1.0"

__all__ = [
    "Blocker",
    "CheckReport",
    "DumpPolicy",
    "DumpResult",
    "ImageError",
    "InDoubt",
    "Inspection",
    "MigrateResult",
    "NullProgress",
    "PeerError",
    "PipelineError",
    "Progress",
    "RebuildError",
    "Refused",
    "RestorePolicy",
    "RestoredTree",
    "Round",
    "StorageError",
    "TargetError",
    "UsageError",
    "__version__",
    "check",
    "dump",
    "inspect",
    "migrate",
    "restore",
    "serve",
]

_RECIPES = frozenset({"check", "dump", "inspect", "migrate", "restore", "serve"})
_HOMES = {name: name for name in _RECIPES} | {
    "CheckReport": "check",
    "DumpPolicy": "policy",
    "DumpResult": "dump",
    "Inspection": "inspect",
    "MigrateResult": "migrate",
    "NullProgress": "progress",
    "Progress": "progress",
    "RestorePolicy": "policy",
    "RestoredTree": "restore",
    "Round": "progress",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    home = importlib.import_module(f"pipeline.{_HOMES.get(name, 'errors')}")
    value = getattr(home, name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """A package in which the import of a recipe's module binds the recipe, not the module."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _RECIPES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
