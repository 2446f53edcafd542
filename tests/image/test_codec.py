"""Records: typed and bounded before they are used, and checked against each other."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ImageError
from pipeline.image import codec
from pipeline.image.codec import Image
from pipeline.image.schema import (
    FORMAT_VERSION,
    Absent,
    AddressSpace,
    AnyRecord,
    Content,
    Extent,
    FileIdentity,
    Head,
    MappedFile,
    Memberships,
    Namespace,
    OpenFile,
    PathRef,
    Process,
    UserNamespace,
    Vma,
)
from tests.harness.tree import ROOT

HEAD = Head(
    version=FORMAT_VERSION,
    machine="x86_64",
    page_size_bytes=4096,
    xfeatures=7,
    xstate_size_bytes=832,
    vdso=bytes(32),
    kernel="6.18",
    created_ns=(1 << 64) - 1,
    root=10,
    monotonic_ns=1,
    boottime_ns=2,
)
RECORDS: list[AnyRecord] = [
    HEAD,
    UserNamespace(index=0),
    UserNamespace(index=1, parent=0, uid_map=[Extent(0, 100000, 65536)], setgroups="deny"),
    Namespace(index=0, kind="uts", external=False, owner=1, state={"nodename": b"\xff"}),
    MappedFile(index=0, path=PathRef(0, b"/bin/\xfe"), identity=FileIdentity(1, -5, 0o755, b"id")),
    Content(space=3, size_bytes=4096),
    OpenFile(index=0, kind="pipe", flags=2, state={"bytes": b"\0\xff"}),
]


def space(*vmas: tuple[int, int]) -> AddressSpace:
    return AddressSpace(
        space=1, vmas=[Vma(a, b, "anon", 3, 2) for a, b in vmas], exe=0, layout=[0] * 11, auxv=b""
    )


@pytest.mark.parametrize(
    "record",
    [*RECORDS, Absent(space=3, dropped=[(0, 4096)], later=[(1 << 63, (1 << 64) - 1)])],
    ids=lambda record: type(record).__name__,
)
def test_a_record_comes_back_as_it_was(record: AnyRecord):
    assert codec.decode(codec.encode(record)) == record


@given(st.binary(max_size=300))
def test_any_bytes_are_a_record_or_refused(content: bytes):
    with suppress(ImageError):
        codec.decode(content)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_changed_byte_is_a_record_or_refused(position: int, change: int):
    raw = bytearray(codec.encode(HEAD))
    raw[position % len(raw)] ^= change
    with suppress(ImageError):
        codec.decode(bytes(raw))


def test_what_is_absent_is_said_behind_the_record_of_its_space():
    image = codec.image_of([HEAD, space((0x1000, 0x9000))])
    image.add(Absent(space=1, dropped=[(0x1000, 0x2000)], later=[(0x3000, 0x5000)]))
    assert (image.spaces[1].dropped, image.spaces[1].later) == ([(0x1000, 0x2000)], [(0x3000, 0x5000)])
    with pytest.raises(ImageError, match="space 2"):
        image.add(Absent(space=2))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xd4\x01\x00",
        codec.encode(HEAD) + b"\0",
        msgpack.packb([1, 2]),
        msgpack.packb({1: 2}),
    ],
    ids=[
        "empty",
        "reserved",
        "endless array",
        "endless bytes",
        "deep",
        "extension",
        "rest",
        "array",
        "int key",
    ],
)
def test_hostile_msgpack_is_refused(content: bytes):
    with pytest.raises(ImageError):
        codec.decode(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "no such"),
        ("root", -1),
        ("root", 1 << 23),
        ("root", "10"),
        ("version", 0),
        ("machine", "x" * 33),
        ("vdso", b"short"),
        ("created_ns", -1),
        ("surplus", 1),
    ],
)
def test_a_field_out_of_bounds_is_refused(field: str, value: object):
    fields = msgspec.to_builtins(HEAD, builtin_types=(bytes,)) | {field: value}
    with pytest.raises(ImageError):
        codec.decode(msgpack.packb(fields))


def test_a_newer_format_is_refused_by_its_number():
    newer = msgspec.structs.replace(HEAD, version=FORMAT_VERSION + 1)
    with pytest.raises(ImageError, match=rf"format {FORMAT_VERSION + 1}.*newer"):
        Image().add(newer)


def test_another_processor_is_refused_by_its_name():
    image = Image()
    image.add(HEAD)
    image.check_machine("x86_64")
    with pytest.raises(ImageError, match="x86_64; this is aarch64"):
        image.check_machine("aarch64")


def test_the_head_comes_first_and_once():
    with pytest.raises(ImageError, match="head"):
        Image().add(RECORDS[1])
    image = Image()
    image.add(HEAD)
    with pytest.raises(ImageError, match="two heads"):
        image.add(HEAD)


@pytest.mark.parametrize("record", RECORDS[1:], ids=lambda record: type(record).__name__)
def test_a_record_that_is_there_twice_is_refused(record: AnyRecord):
    image = Image()
    image.add(HEAD)
    image.add(record)
    with pytest.raises(ImageError, match="twice"):
        image.add(record)


@pytest.mark.parametrize(
    "vmas",
    [[(0x1001, 0x3000)], [(0x1000, 0x1000)], [(0x3000, 0x1000)], [(0x1000, 0x3000), (0x2000, 0x4000)]],
    ids=["unaligned", "empty", "backwards", "overlapping"],
)
def test_mappings_out_of_order_are_refused(vmas: list[tuple[int, int]]):
    image = Image()
    image.add(HEAD)
    with pytest.raises(ImageError, match="out of order"):
        image.add(space(*vmas))


def test_overlapping_lines_of_a_map_are_refused():
    image = Image()
    image.add(HEAD)
    with pytest.raises(ImageError, match="user namespace 1"):
        image.add(UserNamespace(index=1, parent=0, uid_map=[Extent(0, 0, 10), Extent(5, 100, 10)]))


@pytest.mark.parametrize(
    ("records", "named"),
    [
        ([], "user namespace 0"),
        ([UserNamespace(index=0), UserNamespace(index=1, parent=7)], "user namespace 1"),
        ([UserNamespace(index=0), Namespace(index=0, kind="uts", external=False, owner=9)], "namespace 0"),
        ([UserNamespace(index=0), space((0x1000, 0x2000))], "executable 0"),
        ([UserNamespace(index=0)], "pid 10"),
    ],
)
def test_a_reference_to_nothing_is_refused_by_name(records: list[AnyRecord], named: str):
    image = Image()
    for record in [HEAD, *records]:
        image.add(record)
    with pytest.raises(ImageError, match=named):
        image.check_references()


@pytest.mark.parametrize("above", [{1: 1}, {1: 2, 2: 1}, {0: None, 3: 1, 1: 2, 2: 1}])
def test_nobody_is_his_own_ancestor(above: dict[int, int | None]):
    with pytest.raises(ImageError, match=r"space [12] is its own ancestor"):
        Image()._no_ring("space", above)


def test_a_deep_chain_is_no_ring():
    Image()._no_ring("pid", {0: None} | {number: number - 1 for number in range(1, 1000)})


def test_user_namespaces_in_a_ring_are_refused():
    image = Image()
    pid_0 = Process(
        pids=[10],
        parent=0,
        pgid=10,
        sid=10,
        state="zombie",
        namespaces=Memberships(**dict.fromkeys(Memberships.__struct_fields__, 0)),
    )
    ring = [UserNamespace(index=1, parent=2), UserNamespace(index=2, parent=1)]
    records = [HEAD, UserNamespace(index=0), Namespace(index=0, kind="pid", external=True), *ring, pid_0]
    for record in records:
        image.add(record)
    with pytest.raises(ImageError, match=r"user namespace [12] is its own ancestor"):
        image.check_references()


def test_the_types_of_records_are_evaluated_before_they_are_needed() -> None:
    """A pause has no time for it; each type is evaluated only once in a process, so another one looks."""
    code = """
import sys
from pipeline.image import codec
from pipeline.resources.registry import kinds
import msgspec

evaluated = []
sys.addaudithook(lambda event, args: evaluated.append(args[0]) if event == "compile" else None)
codec.prepare([kind.record for kind in kinds()])
print(len(evaluated))
evaluated.clear()
for kind in (*codec._KINDS.values(), *(kind.record for kind in kinds())):
    try:
        msgspec.convert({}, kind)
    except msgspec.ValidationError:
        pass
print(len(evaluated))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    first, then = map(int, done.stdout.split())
    assert first > 100
    assert then == 0
