"""Directories of /proc that may be those of a process that has ended: what of their path is the mount. Pure."""

from __future__ import annotations

import pytest

from pipeline.resources.tasks import directories


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (b"/proc/29/fdinfo", (b"/proc", b"fdinfo")),
        (b"/proc/29/task/30/net/stat", (b"/proc", b"net/stat")),
        (b"/proc/29/task", (b"/proc", b"task")),
        (b"/proc/29 (deleted)", (b"/proc", b"")),
        (b"/srv/1/proc/29/ns", (b"/srv/1/proc", b"ns")),
        (b"/proc/sys/kernel", None),
        (b"/proc", None),
        (b"/29", None),
        (b"/", None),
    ],
)
def test_a_directory_of_a_process(path: bytes, parts: tuple[bytes, bytes] | None) -> None:
    assert directories.of_process(path) == parts
