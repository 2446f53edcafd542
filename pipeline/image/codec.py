"""Records to bytes and back; bytes from a stranger are bounded before they are looked at.

A record is one msgpack map with its kind under ``type``. Decoding goes in two steps:
msgpack with a cap on every length, then the types and bounds of
`pipeline.image.schema`. `Image` collects records and checks that they fit together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar, get_args

import msgpack
import msgspec
from msgspec.structs import replace

from pipeline.errors import ImageError
from pipeline.image.schema import (
    FORMAT_VERSION,
    Absent,
    AddressSpace,
    AnyRecord,
    Cgroup,
    Content,
    End,
    Head,
    Layer,
    MappedFile,
    Namespace,
    OpenFile,
    Process,
    Record,
    SharedMemory,
    Stored,
    TakenFile,
    Together,
    Unchanged,
    UserNamespace,
)
from pipeline.userns.idmap import IdMap, MapError

T = TypeVar("T")

#: no record is larger; 2**20 mappings of 40 bytes fit
MAX_RECORD_BYTES = 64 << 20
_MAX_ITEMS = 1 << 22
_U64 = (1 << 64) - 1
_PAGE_BYTES = 4096

#: by their tags: to convert to one of them takes a fiftieth of what it takes to find it among all
_KINDS: dict[object, type[Record]] = {kind.__struct_config__.tag: kind for kind in get_args(AnyRecord)}
_ENCODER = msgspec.msgpack.Encoder()


def prepare(states: Iterable[type[msgspec.Struct]]) -> None:
    """Have the types of records, and the `states` of open files, evaluated: before there is a tree that waits.

    The first time that one is decoded takes some 0.3 ms.
    """
    for kind in (*_KINDS.values(), *states):
        with suppress(msgspec.ValidationError):
            msgspec.convert({}, kind)


def encode(record: Record) -> bytes:
    """One record as msgpack."""
    return _ENCODER.encode(record)


def unpack(content: bytes | memoryview) -> Any:
    """Untyped msgpack with every length capped.

    Raises:
        ImageError: it is no msgpack, or larger than anything of ours.
    """
    if len(content) > MAX_RECORD_BYTES:
        raise ImageError(f"a record of {len(content)} bytes; the largest allowed has {MAX_RECORD_BYTES}")
    try:
        return msgpack.unpackb(
            content,
            raw=False,
            strict_map_key=True,
            max_str_len=1 << 16,
            max_bin_len=1 << 24,
            max_array_len=_MAX_ITEMS,
            max_map_len=1 << 12,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise ImageError(f"not a valid msgpack record: {error}") from None


def type_by_tag(unpacked: Any, kinds: Mapping[object, type[T]]) -> type[T] | None:
    """The type among `kinds` whose tag an unpacked struct has; None: it has none of them."""
    tag = unpacked.get("type") if isinstance(unpacked, dict) else None
    return kinds.get(tag) if isinstance(tag, str) else None


def decode(content: bytes | memoryview) -> AnyRecord:
    """One record, typed and bounded.

    Raises:
        ImageError: it does not fit its type; says where.
    """
    unpacked = unpack(content)
    try:
        record: AnyRecord = msgspec.convert(unpacked, type_by_tag(unpacked, _KINDS) or AnyRecord)  # type: ignore[assignment]
    except msgspec.ValidationError as error:
        raise ImageError(f"not a valid record: {error}") from None
    return record


def key_of(record: Record) -> object:
    """By what a record is known among those of its type."""
    match record:
        case Process():
            return record.pids[0]
        case AddressSpace() | SharedMemory() | Content():
            return record.space
        case Stored():
            return record.space, record.layer
        case UserNamespace() | Namespace() | Cgroup() | MappedFile() | TakenFile() | OpenFile() | Layer():
            return record.index
    return None


class Image:
    """All records of an image, in order of arrival, checked against each other.

    Raises:
        ImageError: from `add` and `complete`: records are missing, double, or refer to nothing.
    """

    def __init__(self) -> None:
        self._head: Head | None = None
        self.user_namespaces: dict[int, UserNamespace] = {}
        self.namespaces: dict[int, Namespace] = {}
        self.cgroups: dict[int, Cgroup] = {}
        self.mapped_files: dict[int, MappedFile] = {}
        #: files that came along with their content
        self.taken_files: dict[int, TakenFile] = {}
        self.shared_memory: dict[int, SharedMemory] = {}
        self.contents: dict[int, Content] = {}
        #: address spaces by space number
        self.spaces: dict[int, AddressSpace] = {}
        #: processes by level-0 pid, parents before children
        self.processes: dict[int, Process] = {}
        self.files: dict[int, OpenFile] = {}
        self.layers: dict[int, Layer] = {}
        #: what lies in layers, by space and layer
        self.stored: dict[tuple[int, int], Stored] = {}
        self.end: End | None = None

    @property
    def head(self) -> Head:
        """The first record."""
        if self._head is None:
            raise ImageError("the image does not begin with its head")
        return self._head

    def records(self) -> Iterable[Record]:
        """All records but the end, in the order in which they are written."""
        yield self.head
        for table in (
            self.user_namespaces,
            self.namespaces,
            self.cgroups,
            self.mapped_files,
            self.taken_files,
            self.shared_memory,
            self.contents,
            self.spaces,
            self.processes,
            self.files,
            self.layers,
            self.stored,
        ):
            yield from table.values()

    def add(self, record: AnyRecord) -> None:
        """Take the next record in."""
        if isinstance(record, Head):
            if self._head is not None:
                raise ImageError("the image has two heads")
            if record.version > FORMAT_VERSION:
                raise ImageError(
                    f"the image has format {record.version}; this version reads up to {FORMAT_VERSION}: "
                    "use a newer pipeline"
                )
            self._head = record
            return
        if self._head is None:
            raise ImageError("the image does not begin with its head")
        if self.end is not None:
            raise ImageError("records after the end of the image")
        match record:
            case UserNamespace():
                self._put(self.user_namespaces, record)
                try:
                    IdMap(record.uid_map)
                    IdMap(record.gid_map)
                    IdMap(record.projid_map)
                except MapError as error:
                    raise ImageError(f"user namespace {record.index}: {error}") from None
            case Namespace():
                self._put(self.namespaces, record)
            case Cgroup():
                self._put(self.cgroups, record)
            case MappedFile():
                self._put(self.mapped_files, record)
            case TakenFile():
                self._put(self.taken_files, record)
            case SharedMemory():
                size = record.hugetlb
                if size & size - 1 or record.size_bytes % (size or 1):
                    raise ImageError(f"space {record.space}: {record.size_bytes} bytes in pages of {size}")
                self._put(self.shared_memory, record)
            case Content():
                self._put(self.contents, record)
            case AddressSpace():
                self._check_mappings(record)
                self._put(self.spaces, record)
            case Absent():
                self._require(
                    record.space in self.spaces, f"space {record.space} has absent pages, and is missing"
                )
                self.spaces[record.space] = replace(
                    self.spaces[record.space], dropped=record.dropped, later=record.later
                )
            case Process():
                self._put(self.processes, record)
            case OpenFile():
                self._put(self.files, record)
            case Layer():
                if "/" in record.name or record.name.startswith("."):
                    raise ImageError(f"layer {record.index}: {record.name!r} is no name of an object")
                self._put(self.layers, record)
            case Stored():
                self._check_runs(record)
                self._put(self.stored, record)
            case Unchanged():
                raise ImageError("it refers to a draft, and there is none")
            case End():
                self.end = record

    @staticmethod
    def _put(table: dict[Any, Any], record: Record) -> None:
        key = key_of(record)
        if key in table:
            raise ImageError(f"{type(record).__name__} {key} is there twice")
        table[key] = record

    @staticmethod
    def _check_mappings(space: AddressSpace) -> None:
        reached = 0
        for vma in space.vmas:
            fits = reached <= vma.start < vma.end <= _U64 and not (vma.start | vma.end) % _PAGE_BYTES
            if not fits:
                raise ImageError(f"space {space.space}: mapping {vma.start:x}-{vma.end:x} is out of order")
            reached = vma.end

    @staticmethod
    def _check_runs(stored: Stored) -> None:
        reached = 0
        for start, end in stored.runs:
            if not reached <= start < end or (start | end) % _PAGE_BYTES:
                raise ImageError(f"space {stored.space}: pages {start:x}-{end:x} of a layer are out of order")
            reached = end

    def check_machine(self, machine: str) -> None:
        """Raise ImageError if the image was made on another kind of processor."""
        if self.head.machine != machine:
            raise ImageError(f"the image was made on {self.head.machine}; this is {machine}")

    def check_references(self) -> None:
        """Every number that names another record does so, and nobody is his own ancestor.

        Raises:
            ImageError: names the record and what it refers to.
        """
        self._require(0 in self.user_namespaces, "user namespace 0 is missing")
        for userns in self.user_namespaces.values():
            parent = userns.parent
            self._require(
                (parent is None) == (userns.index == 0)
                and (parent is None or parent in self.user_namespaces),
                f"user namespace {userns.index} has no parent",
            )
        for namespace in self.namespaces.values():
            self._require(
                namespace.owner in self.user_namespaces
                and (namespace.parent is None or namespace.parent in self.namespaces),
                f"namespace {namespace.index} has no owner or parent",
            )
        for taken in self.taken_files.values():
            self._require(
                taken.content in self.contents and taken.path.mntns in self.namespaces,
                f"file {taken.index} that came along has no content, or no mount namespace",
            )
        for stored in self.stored.values():
            self._require(
                stored.layer in self.layers
                and (
                    stored.space in self.spaces
                    or stored.space in self.shared_memory
                    or stored.space in self.contents
                ),
                f"pages of space {stored.space} in layer {stored.layer} have no layer, or belong to nothing",
            )
        for space in self.spaces.values():
            self._check_space(space)
        for process in self.processes.values():
            self._check_process(process)
        self._require(self.head.root in self.processes, f"the root, pid {self.head.root}, is missing")
        self._no_ring("user namespace", {n.index: n.parent for n in self.user_namespaces.values()})
        self._no_ring("namespace", {n.index: n.parent for n in self.namespaces.values()})
        self._no_ring("space", {s.space: s.copy_of for s in self.spaces.values()})
        self._no_ring("pid", {p.pids[0]: p.parent or None for p in self.processes.values()})

    def _no_ring(self, what: str, above: dict[int, int | None]) -> None:
        """Everything in `above` leads, step by step, to None."""
        ends: set[int] = set()
        for start in above:
            way: set[int] = set()
            at: int | None = start
            while at is not None and at not in ends:
                self._require(at not in way, f"{what} {at} is its own ancestor")
                way.add(at)
                at = above[at]
            ends |= way

    def _check_space(self, space: AddressSpace) -> None:
        name = f"space {space.space}"
        self._require(space.exe in self.mapped_files, f"{name}: executable {space.exe} is missing")
        self._require(space.copy_of is None or space.copy_of in self.spaces, f"{name}: its parent is missing")
        backings: dict[str, Collection[int]] = {
            "file": self.mapped_files,
            "shared": self.shared_memory,
            "sysv": self.contents,
        }
        for vma in space.vmas:
            known = backings.get(vma.kind)
            fits = vma.backing is None if known is None else vma.backing in known
            if not fits:  # a text for each would cost more than all else
                self._require(fits, f"{name}: mapping {vma.start:x}-{vma.end:x} has no backing")

    def _check_process(self, process: Process) -> None:
        name = f"pid {process.pids[0]}"
        members = process.namespaces
        self._require(
            members.user in self.user_namespaces, f"{name}: user namespace {members.user} is missing"
        )
        for kind in (
            "pid",
            "pid_for_children",
            "mnt",
            "uts",
            "ipc",
            "net",
            "cgroup",
            "time",
            "time_for_children",
        ):
            self._require(
                getattr(members, kind) in self.namespaces, f"{name}: its {kind} namespace is missing"
            )
        for groups in (process.cgroups, *(thread.cgroups or [] for thread in process.threads)):
            self._require(
                all(index in self.cgroups and self.cgroups[index].own for index in groups),
                f"{name}: its cgroup is missing",
            )
        self._require(
            process.parent == 0 or process.parent in self.processes, f"{name}: its parent is missing"
        )
        for kind in Together.__struct_fields__:
            first = getattr(process.together, kind)
            self._require(
                not first
                or (first != process.pids[0] and first in self.processes and self._has_own(first, kind)),
                f"{name}: pid {first}, which it shares with, is missing",
            )
        if process.state == "zombie":
            return
        if process.together.vm:
            same = self.processes[process.together.vm].space == process.space
            self._require(same, f"{name}: it shares its memory, and has other")
        self._require(process.space in self.spaces, f"{name}: its memory is missing")
        self._require(bool(process.threads), f"{name} has no threads")
        self._require(
            process.threads[-1].ended is None and all(thread.ended is None for thread in process.threads[1:]),
            f"{name}: a thread has ended that is not the first of several",
        )
        self._require(
            process.cwd is not None and process.root is not None, f"{name} has no root or working directory"
        )
        for entry in process.fds:
            self._require(
                entry.file in self.files, f"{name} fd {entry.fd}: open file {entry.file} is missing"
            )

    def _has_own(self, pid: int, kind: str) -> bool:
        process = self.processes[pid]
        return process.state != "zombie" and not getattr(process.together, kind)

    @staticmethod
    def _require(holds: bool, otherwise: str) -> None:
        if not holds:
            raise ImageError(f"the image does not fit together: {otherwise}")


def image_of(records: Iterable[Record]) -> Image:
    """Records as an image without its end."""
    image = Image()
    for record in records:
        image.add(record)  # type: ignore[arg-type]
    return image
