"""POSIX message queues: those of the surroundings, what is refused, and that none is ever short of a message."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline.errors import ImageError, RebuildError
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import CLONE, syscall, unshare
from pipeline.resources.namespaces import posix_queues
from pipeline.resources.namespaces.posix_queues import Room
from pipeline.userns.visit import visit
from tests.harness.carry import unharmed
from tests.harness.settings import DEPTH_0, DEPTH_1
from tests.harness.tree import Tree, children_of, dump, engine, reap, restore, said
from tests.resources.fdharness import Capture, Rebuilt, subject

NAME = b"pipeline-test-%d" % os.getpid()
SIGEV_SIGNAL, SIGEV_NONE = 0, 1
MESSAGES = [(9, b"urgent"), (3, b"first"), (3, b"second"), (0, b"")]


@pytest.fixture
def queue() -> Iterator[int]:
    fd = posix_queues.make(NAME, Room(10, 64), MESSAGES, 0o600)
    yield fd
    os.close(fd)
    with suppress(FileNotFoundError):
        posix_queues.unlink(NAME)


def messages(queue: int) -> Any:
    (found,) = msgspec.msgpack.decode(
        visit([], lambda: posix_queues.messages_of(lambda: [queue]), alone=True)
    )
    return [tuple(message) for message in found]


def opened() -> int:
    return posix_queues.opened(NAME, os.O_RDWR | os.O_NONBLOCK)


def told(how: int) -> int:
    fd = opened()
    sigevent = struct.pack("<Qii48x", 0xDEAD, signal.SIGUSR1, how)
    syscall(NR.mq_notify, fd, sigevent)
    return fd


def test_looking_changes_nothing(queue: int) -> None:
    assert messages(queue) == MESSAGES
    assert messages(queue) == MESSAGES


def test_a_queue_of_the_surroundings_is_opened_by_name(queue: int) -> None:
    with subject(opened) as child, Capture(child.pid) as capture, Rebuilt(capture) as new:
        assert messages(new.fd(child.result)) == MESSAGES
        assert os.readlink(f"/proc/self/fd/{new.fd(child.result)}") == f"/{NAME.decode()}"


def test_one_of_another_size_is_named(queue: int) -> None:
    with subject(opened) as child, Capture(child.pid) as capture:
        records = capture.records()
        posix_queues.unlink(NAME)
        os.close(posix_queues.make(NAME, Room(10, 32), [], 0o600))
        with (
            pytest.raises(RebuildError, match="10 messages of 32 bytes here, not 10 of 64"),
            Rebuilt(capture, records),
        ):
            pass


def test_a_path_that_leads_to_no_queue_is_named(queue: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with subject(opened) as child, Capture(child.pid) as capture:
        records = capture.records()
        state = next(record.state for record in records if record.kind == "mqueue")
        state["path"] = [0, os.fsencode(tmp_path / "file")]
        before = os.listdir("/proc/self/fd")
        with pytest.raises(RebuildError, match=r"\(mqueue\) .* cannot be opened: .*Bad file descriptor"):
            Rebuilt(capture, records).__enter__()
        assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("how", [SIGEV_SIGNAL, SIGEV_NONE])
def test_a_queue_that_tells_somebody_is_refused(queue: int, how: int) -> None:
    with subject(partial(told, how)) as child, Capture(child.pid) as capture:
        assert "mq_notify" in capture.reasons(child.result)


def test_whom_a_queue_of_the_surroundings_tells_is_none_of_our_business(queue: int) -> None:
    syscall(NR.mq_notify, queue, struct.pack("<Qii48x", 0, 0, SIGEV_NONE))
    with subject(opened) as child, Capture(child.pid) as capture:
        assert capture.reasons(child.result) == ""
    syscall(NR.mq_notify, queue, None)


def test_one_without_a_name_that_others_have_open_is_refused(queue: int) -> None:
    with subject(opened) as child:
        with Capture(child.pid) as capture:
            assert capture.reasons(child.result) == ""
        posix_queues.unlink(NAME)
        other = os.fork()
        if other == 0:
            signal.pause()
        try:
            with Capture(child.pid) as capture:
                assert "outside the tree" in capture.reasons(child.result)
        finally:
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)


@pytest.mark.parametrize("name", [b"a/b", b"..", b"a\0"])
def test_a_name_of_a_bad_image_is_named(name: bytes) -> None:
    with pytest.raises(ImageError, match="cannot be the name"):
        posix_queues.check_name(name)


def test_no_message_is_lost_whoever_is_killed_meanwhile() -> None:
    many = [(n % 7, b"%d" % n) for n in range(10)]
    many.sort(key=lambda message: -message[0])
    queue = posix_queues.make(NAME, Room(10, 64), many, 0o600)
    chance = random.Random(4)
    before = set(children_of(os.getpid()))
    try:
        for _ in range(60):
            looker = os.fork()
            if looker == 0:
                while True:
                    visit([], lambda: posix_queues.messages_of(lambda: [queue]), alone=True)
            time.sleep(chance.uniform(0.002, 0.015))
            os.kill(looker, signal.SIGKILL)
            os.waitpid(looker, 0)
            left = reap(sorted({*children_of(os.getpid())} - before))  # its visitor, which we inherit
            assert not left
            assert messages(queue) == many
    finally:
        os.close(queue)
        posix_queues.unlink(NAME)


@pytest.mark.root
def test_a_tree_that_runs_on_has_its_messages(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("queues", DEPTH_1)
    with unharmed(tree):
        done = engine("dump", "--pid", tree.pid, "--to", tmp_path / "image", "--leave-running")
        assert done.returncode == 0, said(done)


@pytest.mark.root
def test_queues_of_the_surroundings(start: Callable[..., Tree], tmp_path: Path) -> None:
    tree = start("queues", DEPTH_0, arguments=["external"])
    prefix = b"test-%d-" % tree.pid
    try:
        with unharmed(tree):
            dump(tree, tmp_path / "image")
            restore(tree, tmp_path / "image")
        assert tree.end() == 0
    finally:
        for name in (b"plain", b"nobody-has-it-open", b"wait", b"answer"):
            with suppress(FileNotFoundError):
                posix_queues.unlink(prefix + name)


@pytest.mark.root
def test_a_queue_of_a_namespace_that_is_not_the_trees_is_refused(start: Callable[..., Tree]) -> None:
    def elsewhere() -> int:
        here = os.open("/proc/self/ns/ipc", os.O_RDONLY)
        unshare(CLONE.NEWIPC)
        fd = posix_queues.make(NAME, Room(1, 1), [], 0o600)
        syscall(NR.setns, here, CLONE.NEWIPC)
        os.close(here)
        return fd

    with subject(elsewhere) as child:
        done = engine("check", "--pid", child.pid)
        assert "an ipc namespace that is not the tree's" in done.stdout + done.stderr, said(done)
