"""Kinds of open files that are never carried: each says why in `check`, and an image cannot hold one."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.errors import RebuildError, TargetError
from pipeline.ids import LocalFd
from pipeline.image.schema import OpenFile, Record
from pipeline.resources.kinds import CaptureScope, CreateScope, FdView
from pipeline.resources.steps import CompleteOnceCreated


class NoState(Record, frozen=True):
    """There is never one."""


class AlwaysRefused(CompleteOnceCreated):
    """Base of kinds whose `check` always finds a reason."""

    record: type[NoState] = NoState
    carried: Sequence[str] = ()

    def capture(self, view: FdView, scope: CaptureScope) -> NoState:
        """See that nothing of this kind gets into an image.

        Raises:
            TargetError: always; the descriptor has come to lead to such a file since it was checked.
        """
        raise TargetError(f"{view.subject} cannot be carried, and was not refused when it was checked")

    def create(self, file: OpenFile, record: NoState, scope: CreateScope) -> LocalFd:
        """See that nothing of this kind comes out of an image.

        Raises:
            RebuildError: always.
        """
        raise RebuildError(f"open file {file.index} is of a kind that cannot be made ({file.kind})")
