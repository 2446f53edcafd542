"""All kinds of task and memory state, in the order of the support matrix."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.resources.cgroups import capture as cgroups
from pipeline.resources.memory import aio, classify
from pipeline.resources.support import Support
from pipeline.resources.tasks import (
    attributes,
    credentials,
    directories,
    interrupted,
    job_control,
    keyrings,
    leaders,
    limits,
    scheduling,
    seccomp,
    semaphore_undo,
    signals,
    timers,
    together,
    tracing,
)

KINDS: Sequence[Support] = (
    leaders.SUPPORT,
    directories.SUPPORT,
    credentials.SUPPORT,
    signals.SUPPORT,
    timers.SUPPORT,
    interrupted.SUPPORT,
    job_control.SUPPORT,
    limits.SUPPORT,
    scheduling.SUPPORT,
    seccomp.SUPPORT,
    attributes.SUPPORT,
    keyrings.SUPPORT,
    cgroups.SUPPORT,
    together.SUPPORT,
    semaphore_undo.SUPPORT,
    tracing.SUPPORT,
    *classify.SUPPORT,
    aio.SUPPORT,
)
