"""Capturing address spaces of real programs: every kind of mapping, every refusal."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.ids import HostPid, RemoteAddress
from pipeline.image.schema import Vma
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.pagemap import total_bytes
from pipeline.kernel.smaps import parse_smaps
from pipeline.kernel.syscalls import pidfd_getfd, pidfd_open
from pipeline.ledger import LEDGER
from pipeline.resources.kinds import FdView
from pipeline.resources.memory.capture import Captured, capture_address_space
from pipeline.resources.memory.classify import classify
from pipeline.resources.memory.objects import MemoryObjects, SharedObject
from pipeline.resources.memory.pages import read_shared
from pipeline.resources.memory.scope import CannotCarry
from tests.resources.memorytarget import Program, Scope, program

PAGE = 4096
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as path:
        yield path


@contextmanager
def captured(target: Program) -> Iterator[tuple[Captured, MemoryObjects]]:
    before = LEDGER.held()
    with Scope() as scope, MemoryObjects(scope) as objects:
        yield capture_address_space(target.pid, objects, brk=RemoteAddress(0)), objects
    assert LEDGER.held() == before


def at(found: Captured, address: int) -> Vma:
    return next(vma for vma in found.space.vmas if vma.start <= address < vma.end)


def saved(found: Captured, address: int) -> bool:
    return any(start <= address < end for start, end in found.runs)


@pytest.mark.parametrize("of", ["exe", pytest.param("map_files", marks=pytest.mark.root)])
def test_a_file_that_cannot_be_looked_at_leaves_no_descriptor(
    monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    """Such as one of a network filesystem whose server is gone (ESTALE)."""
    genuine = os.open, os.fstat
    opened: set[int] = set()

    def watched(path: str, *arguments: int, **options: int) -> int:
        fd = genuine[0](path, *arguments, **options)
        if f"/{of}" in os.fsdecode(path):
            opened.add(fd)
        return fd

    def stale(fd: int) -> os.stat_result:
        if fd in opened:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return genuine[1](fd)

    with program("ready()") as target, Scope() as scope:
        before = set(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(os, "open", watched)
        monkeypatch.setattr(os, "fstat", stale)
        with MemoryObjects(scope) as objects, pytest.raises(OSError, match="Stale"):
            capture_address_space(target.pid, objects, brk=RemoteAddress(0))
        monkeypatch.undo()
        assert opened
        assert set(os.listdir("/proc/self/fd")) == before


def test_private_anonymous_memory_with_its_properties() -> None:
    body = """
a = mmap(4); write(a, b"x"); mprotect(a, 4, R)
b = mmap(4, flags=PRIVATE | ANON | NORESERVE); write(b + P, b"y")
none = mmap(4, prot=0)
down = mmap(8, flags=PRIVATE | ANON | GROWSDOWN); write(down + 7 * P, b"d")
advised = mmap(2)
for advice in (1, 10, 16, 18): madvise(advised, 2, advice)
huge = mmap(1024); madvise(huge, 1024, 14)
small = mmap(8); madvise(small, 8, 15)
locked = mmap(2); call(149, locked, 2 * P)
onfault = mmap(2); call(325, onfault, 2 * P, 1)
guarded = mmap(8); write(guarded, b"g" * 8 * P); madvise(guarded + 2 * P, 2, 102)
sealed = mmap(2, prot=R); call(462, sealed, 2 * P, 0)
read_only = mmap(4); ctypes.string_at(read_only, 4 * P)
ready(**{k: v for k, v in globals().items() if k in
  "a b none down advised huge small locked onfault guarded sealed read_only".split()})
"""
    with program(body) as target, captured(target) as (found, _):
        assert found.blockers == []
        a = at(found, target["a"])
        assert (a.kind, a.prot, a.flags) == ("anon", 1, 2)
        assert saved(found, target["a"])
        assert not saved(found, target["a"] + PAGE)
        b = at(found, target["b"])
        assert b.flags == 0x4002
        assert not saved(found, target["b"])
        assert saved(found, target["b"] + PAGE)
        assert at(found, target["none"]).prot == 0
        assert at(found, target["down"] + 7 * PAGE).flags & 0x100
        assert at(found, target["advised"]).advice == [1, 10, 16, 18]
        assert at(found, target["huge"]).advice == [14]
        assert at(found, target["small"]).advice == [15]
        assert at(found, target["locked"]).locked == "now"
        assert at(found, target["onfault"]).locked == "onfault"
        guards = (target["guarded"] + 2 * PAGE, target["guarded"] + 4 * PAGE)
        assert at(found, target["guarded"]).guards == [guards]
        assert saved(found, target["guarded"] + PAGE)
        assert not saved(found, target["guarded"] + 2 * PAGE)
        assert at(found, target["sealed"]).sealed
        assert not saved(found, target["read_only"]), "the zero page is no content"


def test_names_given_by_the_program() -> None:
    line = b"7f0000000000-7f0000001000 rw-p 00000000 00:00 0    %s\nSize: 4 kB\nVmFlags: rd wr mr mw me ac \n"
    (named,) = parse_smaps(line % b"[anon:a name]")
    assert classify(named).name == b"a name"
    shared = parse_smaps(
        (line % b"[anon_shmem:s]").replace(b"00:00 0 ", b"00:01 77 ").replace(b"rw-p", b"rw-s")
    )
    assert (classify(shared[0]).kind, classify(shared[0]).name) == ("shared", b"s")


def test_protection_key_is_refused() -> None:
    entry = b"7000-8000 rw-p 00000000 00:00 0 \nSize: 4 kB\nProtectionKey:         3\nVmFlags: rd wr \n"
    (mapping,) = parse_smaps(entry)
    with pytest.raises(CannotCarry, match="protection key 3"):
        classify(mapping)


@pytest.mark.parametrize("flags", ["rd wr pf", "rd wr ss", "rd wr zz", "rd mm io"])
def test_flags_that_are_not_carried(flags: str) -> None:
    (mapping,) = parse_smaps(b"7000-8000 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: %s \n" % flags.encode())
    with pytest.raises(CannotCarry):
        classify(mapping)


def test_stack_heap_and_the_kernels_own() -> None:
    with (
        program("x = [bytearray(100) for _ in range(9999)]\nready()") as target,
        captured(target) as (found, _),
    ):
        kinds = {vma.kind for vma in found.space.vmas}
        assert {"vdso", "vvar", "vsyscall"} <= kinds
        layout = found.space.layout
        stack, heap = at(found, layout[6]), at(found, layout[4])
        assert stack.flags == 0x102
        assert stack.kind == heap.kind == "anon"
        assert saved(found, layout[6])
        assert layout[7] < layout[8] <= layout[9] < layout[10]
        assert found.space.auxv[-16:] == bytes(16)
        own = [v for v in found.space.vmas if v.kind in {"vdso", "vvar", "vvar_vclock", "vsyscall"}]
        assert not any(saved(found, address) for v in own for address in range(v.start, v.end, PAGE))


def test_files_private_and_shared(folder: str) -> None:
    body = """
path = sys.argv[1] + "/a b\\n\\\\012 (deleted)"
fd = os.open(path, os.O_RDWR | os.O_CREAT); os.write(fd, b"f" * 4 * P)
private = mmap(4, flags=PRIVATE, fd=fd); write(private + P, b"changed"); mprotect(private, 4, R)
shared = mmap(2, flags=SHARED, fd=fd, offset=2 * P); write(shared, b"s")
ro = os.open(path, os.O_RDONLY)
read_only = mmap(4, prot=R, flags=SHARED, fd=ro)
zero = mmap(2, flags=PRIVATE, fd=os.open("/dev/zero", os.O_RDWR)); write(zero, b"z")
ready(private=private, shared=shared, read_only=read_only, zero=zero)
"""
    with program(body, folder) as target, captured(target) as (found, objects):
        assert found.blockers == []
        private, shared = at(found, target["private"]), at(found, target["shared"])
        read_only, zero = at(found, target["read_only"]), at(found, target["zero"])
        assert (private.kind, private.flags, private.prot) == ("file", 2, 1)
        assert (shared.kind, shared.flags, shared.offset) == ("file", 1, 2 * PAGE)
        assert not shared.readonly_file
        assert read_only.readonly_file
        files = objects.mapped_files
        assert private.backing is not None
        assert shared.backing is not None
        assert zero.backing is not None
        assert private.backing == read_only.backing != shared.backing
        assert files[private.backing].path.path == os.fsencode(folder) + b"/a b\n\\012 (deleted)"
        assert not files[private.backing].deleted
        assert (files[private.backing].writable, files[shared.backing].writable) == (False, True)
        assert files[zero.backing].path.path == b"/dev/zero"
        assert saved(found, target["private"] + PAGE)
        assert not saved(found, target["private"])
        assert not saved(found, target["shared"])
        assert saved(found, target["zero"])
        exe = files[found.space.exe]
        assert exe.path.path == os.readlink(f"/proc/{target.pid}/exe").encode()
        assert exe.identity.build_id or exe.identity.size_bytes


@pytest.mark.root
def test_deleted_file_is_carried_and_another_name_is_found_or_refused(folder: str) -> None:
    body = """
def file(name):
    fd = os.open(sys.argv[1] + name, os.O_RDWR | os.O_CREAT); os.write(fd, name.encode() * P)
    return mmap(1, flags=SHARED, fd=fd)
gone = file("/gone"); os.unlink(sys.argv[1] + "/gone")
linked = file("/linked"); os.link(sys.argv[1] + "/linked", sys.argv[1] + "/other"); os.unlink(sys.argv[1] + "/linked")
os.mkdir(sys.argv[1] + "/away")
moved = file("/moved"); os.link(sys.argv[1] + "/moved", sys.argv[1] + "/away/x"); os.unlink(sys.argv[1] + "/moved")
ready(gone=gone, linked=linked, moved=moved)
"""
    with program(body, folder) as target, Scope() as scope, MemoryObjects(scope) as objects:
        found = capture_address_space(target.pid, objects, brk=RemoteAddress(0))
        backing = at(found, target["gone"]).backing
        assert backing is not None
        gone = objects.mapped_files[backing]
        assert gone.deleted
        assert gone.path.path == os.fsencode(folder) + b"/gone"
        assert gone.content is not None
        assert os.pread(scope.contents[gone.content], 5, 0) == b"/gone"
        backing = at(found, target["linked"]).backing
        assert backing is not None
        linked = objects.mapped_files[backing]
        assert (linked.path.path, linked.last_name) == tuple(
            os.fsencode(folder) + name for name in (b"/other", b"/linked")
        )
        assert not linked.deleted
        (refused,) = found.blockers
        assert refused.subject.startswith(f"pid {target.pid} mapping {target['moved']:x}-")
        assert "leads to another file" in refused.reason


@pytest.mark.root
def test_names_in_another_mount_namespace(folder: str) -> None:
    body = """
def file(name):
    fd = os.open(sys.argv[1] + name, os.O_RDWR | os.O_CREAT); os.write(fd, name.encode() * P)
    return mmap(1, flags=PRIVATE, fd=fd)
covered = file("/covered")
call(272, 0x20000)
check(libc.mount(None, b"/", None, 0x44000, None))
check(libc.mount(b"inside", sys.argv[1].encode(), b"tmpfs", 0, None))
inside = file("/inside")
ready(covered=covered, inside=inside)
"""
    with program(body, folder) as target, captured(target) as (found, objects):
        assert not os.path.exists(f"{folder}/inside")
        backing = at(found, target["inside"]).backing
        assert backing is not None
        assert not objects.mapped_files[backing].deleted
        (refused,) = found.blockers
        assert f"mapping {target['covered']:x}-" in refused.subject
        assert "/covered leads to another file, or to none" in refused.reason


@pytest.mark.parametrize("memfd", [False, True])
@pytest.mark.root
def test_deleted_executable_is_carried(folder: str, memfd: bool) -> None:
    with open("/bin/sleep", "rb") as file:
        image = file.read()
    if memfd:
        fd = os.memfd_create("tool")
        os.write(fd, image)
        path = f"/proc/self/fd/{fd}"
    else:
        path = f"{folder}/tool"
        shutil.copy("/bin/sleep", path)
        fd = os.open(path, os.O_RDONLY)
    child = subprocess.Popen([path, "1000"], executable=path, pass_fds=[fd] if memfd else [])
    os.close(fd)
    # Popen returns when the old program is gone; the new one has mapped all that it will when it sleeps
    while not Path(f"/proc/{child.pid}/syscall").read_text().startswith(f"{NR.clock_nanosleep} "):
        time.sleep(0.005)
    if not memfd:
        os.unlink(path)
    try:
        with Scope() as scope, MemoryObjects(scope) as objects:
            found = capture_address_space(HostPid(child.pid), objects, brk=RemoteAddress(0))
            assert found.blockers == []
            exe = objects.mapped_files[found.space.exe]
            assert exe.deleted
            assert exe.identity.build_id
            if memfd:
                (shared,) = objects.shared_memory
                assert shared.fd is not None
                assert exe.content == shared.record.space
                assert os.pread(shared.fd, len(image) + 1, 0) == image
                code = [v for v in found.space.vmas if v.backing == exe.content and v.kind == "shared"]
                assert {v.flags for v in code} == {2}
            else:
                assert exe.path.path == path.encode()
                assert exe.content is not None
                assert os.pread(scope.contents[exe.content], len(image) + 1, 0) == image
                assert any(v.kind == "file" and v.backing == found.space.exe for v in found.space.vmas)
    finally:
        child.kill()
        child.wait()


def test_memory_shared_between_processes_and_descriptors() -> None:
    body = """
shared = mmap(8, flags=SHARED | ANON); write(shared + 3 * P, b"hello")
fd = os.memfd_create("a memfd", os.MFD_ALLOW_SEALING); os.ftruncate(fd, 5 * P + 7)
import fcntl
memfd = mmap(4, flags=SHARED, fd=fd, offset=P); write(memfd, b"m")
copy = mmap(2, flags=PRIVATE, fd=fd); write(copy, b"own")
fcntl.fcntl(fd, 1033, 2)
if child := os.fork():
    ready(shared=shared, memfd=memfd, fd=fd, copy=copy, child=child)
import time
time.sleep(1000)
"""
    with program(body) as target, Scope() as scope, MemoryObjects(scope) as objects:
        try:
            pidfd = pidfd_open(target.pid)
            local = pidfd_getfd(pidfd, target["fd"])
            os.close(pidfd)
            view = FdView(
                target.pid,
                target["fd"],
                local,
                os.readlink(f"/proc/{target.pid}/fd/{target['fd']}".encode()),
                os.fstat(local),
                {},
                os.O_RDWR,
                0,
            )
            space = objects.memory_of(view)
            os.close(local)
            one = capture_address_space(target.pid, objects, brk=RemoteAddress(0))
            other = capture_address_space(target["child"], objects, brk=RemoteAddress(0))
            assert one.blockers == other.blockers == []
            shared, memfd, copy = (at(one, target[name]) for name in ("shared", "memfd", "copy"))
            assert (shared.kind, shared.flags) == ("shared", 1)
            assert at(other, target["shared"]).backing == shared.backing
            assert (memfd.backing, memfd.offset) == (space, PAGE)
            assert (copy.kind, copy.flags, copy.backing) == ("shared", 2, space)
            assert saved(one, target["copy"])
            assert not saved(one, target["memfd"])
            records = {o.record.space: o.record for o in objects.shared_memory}
            assert shared.backing is not None
            assert (records[shared.backing].kind, records[shared.backing].size_bytes) == ("anon", 8 * PAGE)
            assert (records[space].kind, records[space].name) == ("memfd", b"a memfd")
            assert records[space].seals == 2
            assert records[space].size_bytes == 5 * PAGE + 7
        finally:
            os.kill(target["child"], 9)


REFUSED = {
    "a System V shared memory segment": """
i = call(29, 0, 2 * P, 0o600); address = call(30, i, 0, 0); call(31, i, 0, 0)
""",
    "watched by a userfaultfd": """
fd = call(323, 1); api = (ctypes.c_ulong * 3)(0xAA, 0, 0); check(libc.ioctl(fd, ctypes.c_ulong(0xC018AA3F), api))
address = mmap(4); arg = (ctypes.c_ulong * 4)(address, 4 * P, 1, 0)
check(libc.ioctl(fd, ctypes.c_ulong(0xC020AA00), arg))
""",
    "ring of an io_uring": """
fd = call(425, 4, ctypes.create_string_buffer(120)); address = mmap(1, flags=SHARED, fd=fd, offset=0)
""",
    "secret memory": """
fd = call(447, 0); os.ftruncate(fd, P); address = mmap(1, flags=SHARED, fd=fd)
""",
    "ring of a perf event": """
attr = bytearray(128); attr[0:8] = (1).to_bytes(4, "little") + (128).to_bytes(4, "little")
fd = call(298, (ctypes.c_char * 128).from_buffer(attr), 0, -1, -1, 0); address = mmap(2, flags=SHARED, fd=fd)
""",
    "maps a file of hugetlbfs": """
call(272, 0x20000); call(165, 0, b"/", 0, 0x44000, 0); call(165, b"none", b"/mnt", b"hugetlbfs", 0, 0)
fd = os.open("/mnt/file", os.O_RDWR | os.O_CREAT)
address = mmap(512, flags=PRIVATE | NORESERVE, fd=fd)
""",
    "a System V segment of huge pages": """
i = call(29, 0, 512 * P, 0o14600); address = call(30, i, 0, 0); call(31, i, 0, 0)
""",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refused_mapping_is_named(reason: str) -> None:
    attempt = "try:\n" + "".join(f"    {line}\n" for line in REFUSED[reason].strip().splitlines())
    body = attempt + "except OSError as error:\n    ready(missing=str(error))\nready(address=address)"
    with program(body) as target:
        if "missing" in target.facts:
            pytest.skip(f"this kernel or machine has it not: {target['missing']}")
        with captured(target) as (found, _):
            assert any(
                reason in blocker.reason and f"mapping {target['address']:x}-" in blocker.subject
                for blocker in found.blockers
            ), found.blockers


def test_refusals_do_not_hide_each_other() -> None:
    body = REFUSED["watched by a userfaultfd"] + REFUSED["a System V shared memory segment"] + "ready()"
    with program(body) as target, captured(target) as (found, _):
        assert len(found.blockers) == 2


def test_one_sparse_gibibyte() -> None:
    body = """
size = 1 << 18
address = mmap(size, flags=PRIVATE | ANON | NORESERVE); madvise(address, size, 15)
for page in range(0, size, 1024): write(address + page * P, b"x")
ready(address=address)
"""
    with program(body) as target, captured(target) as (found, _):
        inside = [(a, b) for a, b in found.runs if target["address"] <= a < target["address"] + (1 << 30)]
        assert total_bytes(inside) == 256 * PAGE
        assert all((a - target["address"]) % (1024 * PAGE) == 0 for a, _ in inside)


def test_twenty_thousand_mappings() -> None:
    body = """
address = mmap(40000)
for page in range(0, 40000, 2): mprotect(address + page * P, 1, R)
ready(address=address)
"""
    with program(body) as target, captured(target) as (found, _):
        inside = [
            v for v in found.space.vmas if target["address"] <= v.start < target["address"] + 40000 * PAGE
        ]
        assert len(inside) >= 39_999
        assert [v.prot for v in inside[:4]] == [1, 3, 1, 3]


#: becomes nobody, who may be looked at by nobody
AS_NOBODY = "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534); libc.prctl(4, 1)"


def done_by_nobody(act: Callable[[], None]) -> None:
    """Do something as a plain user, in a child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            act()
            status = 0
        except BaseException as error:  # noqa: BLE001 - told to the parent, in whose place we are
            os.write(writer, repr(error).encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as told:
        message = told.read()
    assert os.waitpid(child, 0)[1] == 0, message.decode()


needs_system_python = pytest.mark.skipif(
    not os.path.exists(SYSTEM_PYTHON), reason="needs a Python that everybody may read"
)


@needs_system_python
@pytest.mark.root
def test_plain_user_captures_its_own_program() -> None:
    body = f"""
{AS_NOBODY}
shared = mmap(8, flags=SHARED | ANON); write(shared + 3 * P, b"hello")
fd = os.memfd_create("closed"); os.ftruncate(fd, 6 * P); os.pwrite(fd, b"written", 5 * P)
closed = mmap(6, flags=SHARED, fd=fd); write(closed, b"mapped"); os.close(fd)
own = mmap(1); write(own, b"x")
ready(shared=shared, closed=closed, own=own)
"""

    def look() -> None:
        with Scope() as scope, MemoryObjects(scope) as objects:
            found = capture_address_space(target.pid, objects, brk=RemoteAddress(0))
            assert found.blockers == []
            by_kind = {shared.record.kind: shared for shared in objects.shared_memory}
            assert by_kind.keys() == {"anon", "memfd"}
            shared, closed = by_kind["anon"], by_kind["memfd"]
            assert shared.fd is None
            assert closed.fd is None
            assert shared.record.size_bytes == 8 * PAGE
            assert (closed.record.name, closed.record.size_bytes) == (b"closed", 6 * PAGE)
            assert _pages(shared) == {3 * PAGE: b"hello"}
            assert _pages(closed) == {0: b"mapped", 5 * PAGE: b"written"}
            assert saved(found, target["own"])

    with program(body, python=SYSTEM_PYTHON) as target:
        done_by_nobody(look)


def _pages(shared: SharedObject) -> dict[int, bytes]:
    """What shared memory has, by its offset, without zeros behind it."""
    buffer = bytearray(1 << 16)
    found = {}
    for segments, _ in read_shared(shared, buffer):
        at = 0
        for offset, length in segments:
            found[offset] = bytes(buffer[at : at + length]).rstrip(b"\0")
            at += length
    return found


@needs_system_python
@pytest.mark.root
@pytest.mark.parametrize(
    ("mapped", "reason"),
    [
        (
            "mmap(4, flags=PRIVATE, fd=fd)",
            "is a private mapping of a memfd that no descriptor refers to any more",
        ),
        (
            "mmap(6, flags=SHARED, fd=fd)",
            "reaches behind the end of a memfd that no descriptor refers to any more",
        ),
    ],
    ids=["private", "beyond"],
)
def test_plain_user_is_told_of_a_memfd_that_is_not_seen_as_it_is(mapped: str, reason: str) -> None:
    body = f"""
{AS_NOBODY}
fd = os.memfd_create("closed"); os.ftruncate(fd, 4 * P); closed = {mapped}; os.close(fd)
ready(closed=closed)
"""

    def look() -> None:
        with Scope() as scope, MemoryObjects(scope) as objects:
            found = capture_address_space(target.pid, objects, brk=RemoteAddress(0))
            assert [blocker.reason for blocker in found.blockers] == [f"{reason}; only root can open it"]

    with program(body, python=SYSTEM_PYTHON) as target:
        done_by_nobody(look)
