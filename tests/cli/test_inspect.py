"""`inspect`: what a person reads, and the document for scripts, of an image made of records."""

from __future__ import annotations

import io
import json

from rich.console import Console

from pipeline.cli import inspect, render
from pipeline.image.codec import Image
from pipeline.image.schema import (
    AddressSpace,
    Credentials,
    Extent,
    FdEntry,
    FileIdentity,
    Head,
    Id,
    MappedFile,
    Memberships,
    Namespace,
    OpenFile,
    PathRef,
    Process,
    Scheduling,
    SharedMemory,
    Thread,
    UserNamespace,
    Vma,
)
from pipeline.inspect import Inspection

_KINDS = ("pid", "mnt", "uts", "ipc", "net", "cgroup", "time")


def _thread(pids: list[int], userns: int, uid: Id) -> Thread:
    return Thread(
        pids=pids,
        comm=b"worker[1]",
        registers=b"\x00\xff",
        xstate=b"",
        sigmask=0,
        credentials=Credentials(
            userns=userns,
            uids=[uid] * 4,
            gids=[uid] * 4,
            groups=[],
            caps=[0] * 5,
            securebits=0,
            no_new_privs=False,
        ),
        scheduling=Scheduling(
            policy=0,
            flags=0,
            nice=0,
            priority=0,
            runtime_ns=0,
            deadline_ns=0,
            period_ns=0,
            affinity=[0],
            ioprio=0,
        ),
    )


def _process(pids: list[int], parent: int, user: int, uid: Id) -> Process:
    indexes = {kind: index for index, kind in enumerate(_KINDS)}
    return Process(
        pids=pids,
        parent=parent,
        pgid=pids[0],
        sid=pids[0],
        state="running",
        namespaces=Memberships(user=user, pid_for_children=0, time_for_children=6, **indexes),
        space=7,
        fds=[FdEntry(0, 0, False), FdEntry(1, 0, False)],
        cwd=PathRef(1, b"/"),
        root=PathRef(1, b"/"),
        threads=[_thread(pids, user, uid)],
    )


def image() -> Inspection:
    made = Image()
    for record in (
        Head(
            version=1,
            machine="x86_64",
            page_size_bytes=4096,
            xfeatures=7,
            xstate_size_bytes=832,
            vdso=bytes(32),
            kernel="6.18.0",
            created_ns=1_800_000_000_000_000_000,
            root=10,
            monotonic_ns=1,
            boottime_ns=1,
        ),
        UserNamespace(index=0),
        UserNamespace(
            index=1,
            parent=0,
            owner=Id(0, 0),
            uid_map=[Extent(0, 100000, 65536)],
            gid_map=[Extent(5, 9, 1)],
            setgroups="deny",
        ),
        *(Namespace(index=index, kind=kind, external=True) for index, kind in enumerate(_KINDS)),
        Namespace(index=8, kind="uts", external=False, owner=1, state={"hostname": b"inside"}),
        MappedFile(index=0, path=PathRef(1, b"/usr/bin/python3"), identity=FileIdentity(1, 1, 0o755)),
        SharedMemory(space=9, kind="memfd", size_bytes=8192, name=b"queue"),
        AddressSpace(
            space=7, vmas=[Vma(4096, 12288, "anon", 3, 2)], exe=0, layout=[0] * 11, auxv=b"\x01\x02"
        ),
        _process([10], 0, 0, Id(0, 0)),
        _process([11, 1], 10, 1, Id(0, 4242)),
        OpenFile(
            index=0, kind="regular", flags=2, position=77, state={"path": [1, b"/var/log/[x]"], "size": 5}
        ),
        OpenFile(
            index=1,
            kind="tcp",
            flags=2,
            state={"local": [bytes([10, 0, 0, 1]), 80, 0, ""], "backlog": 5, "x": 0},
        ),
        OpenFile(index=2, kind="pipe", flags=1, state={"pipe": 3, "mode": 384}),
    ):
        made.add(record)
    return Inspection(made, {7: 8192, 9: 4096}, 20_000)


def shown() -> str:
    out = io.StringIO()
    inspect.show(image(), "s3://bucket/[image]", Console(file=out, width=160, highlight=False))
    return out.getvalue()


def test_a_person_sees_tree_maps_files_and_sizes() -> None:
    text = shown()
    for fact in (
        "s3://bucket/[image]: format 1, x86_64, Linux 6.18.0",
        "2 processes, 2 threads, 3 open files, pages: 12.3 kB, image: 20.0 kB",
        "10 worker[1]",
        "11 / 1 worker[1]",
        "uid 4242 of user namespace 0, unmapped here",
        "uid 0-65535 -> 100000",
        "gid 5 -> 9",
        "setgroups denied",
        "hostname inside",
        "/usr/bin/python3",
        "memfd queue",
        "/var/log/[x]",
        "10:0 10:1 11:0 11:1",
        "10.0.0.1:80, listening",
        "other end of 3",
        "a message in a socket",
    ):
        assert fact in text, f"{fact!r} is missing in\n{text}"


def test_a_child_stands_below_its_parent() -> None:
    lines = shown().splitlines()
    parent = next(line for line in lines if "10 worker" in line)
    child = next(line for line in lines if "11 / 1 worker" in line)
    assert lines.index(parent) < lines.index(child)
    assert parent.index("10 worker") < child.index("11 / 1")


def test_the_document_is_json_and_complete() -> None:
    document = json.loads(json.dumps(inspect.as_document(image())))
    assert document["image-bytes"] == 20_000
    assert document["page-bytes"] == {"7": 8192, "9": 4096}
    assert document["processes"][1]["pids"] == [11, 1]
    assert document["processes"][0]["threads"][0]["registers"] == "hex:00ff"
    assert document["mapped-files"][0]["path"]["path"] == "/usr/bin/python3"


def test_bytes_that_are_no_text_are_hexadecimal() -> None:
    assert render.plain([b"/tmp/x", b"\xff", b"a\nb"]) == ["/tmp/x", "hex:ff", "hex:610a62"]
