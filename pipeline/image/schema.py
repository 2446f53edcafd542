"""The records of an image: what a tree *is*, without a single id of the host.

Rules of this file:

* A uid or gid is an `Id`: a user namespace of the image's forest and the id
  inside it. A pid is recorded per pid namespace, outermost first. A namespace is
  recorded by its place in the forest. Index 0 of every namespace kind is the
  *external* one: the namespace that the tree shares with its surroundings and
  that the destination supplies.
* Everything is typed and bounded here; `pipeline.image.codec` refuses what does
  not fit before any of it is used.
* Descriptors are extensible: an `OpenFile` holds the record of its kind as a
  plain mapping, whose type stands in the kind's file under `pipeline.resources`.
* Bytes that can be large (pages) are never inside records. They travel as page
  frames (`pipeline.image.frames`) that name a *space*: the number by which an
  address space, a shared memory object or a file content is known in the image.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

FORMAT_VERSION = 1

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFF_FFFF)]
# msgspec bounds integers by 64-bit signed literals; a decoder checks the upper end.
U64 = Annotated[int, Meta(ge=0)]
I32 = Annotated[int, Meta(ge=-0x8000_0000, le=0x7FFF_FFFF)]
I64 = int
Pid = Annotated[int, Meta(ge=0, le=1 << 22)]
Index = Annotated[int, Meta(ge=0, le=1 << 24)]
Path = Annotated[bytes, Meta(max_length=4096)]
Small = Annotated[bytes, Meta(max_length=65536)]


class Record(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every record."""


class Id(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A uid or gid: the id `id` inside user namespace `ns` of the image.

    `ns` is the innermost namespace, from the holder's own upwards, in which the
    id is mapped. If it is not the holder's own namespace, the id is *unmapped*
    there: an explicit state that the destination recreates or refuses.
    """

    ns: Index
    id: U32


class Extent(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One line of a uid or gid map: `count` ids from `inner` on are `lower` on in the *parent*."""

    inner: U32
    lower: U32
    count: Annotated[int, Meta(ge=1, le=0xFFFF_FFFF)]


Extents = Annotated[list[Extent], Meta(max_length=340)]


class ShellJob(Record, frozen=True, kw_only=True):
    """The tree is a job of a shell outside: what it has set the terminal to, as far as it is known.

    `settings`: struct termios2. `window`: struct winsize. `foreground`: level-0 number of the process group in the
    foreground, 0: one that is led from outside, None: the tree was in the background.
    """

    settings: Annotated[bytes, Meta(max_length=44)]
    window: Annotated[bytes, Meta(max_length=8)]
    foreground: Pid | None


class Head(Record, frozen=True, kw_only=True, tag="head"):
    """First record: what the image is and where it can run.

    `vdso` is the SHA-256 of the vdso image; code of the tree holds pointers into it.
    `xfeatures`: what the saved extended state consists of (XCR0 bits).
    `monotonic_ns`, `boottime_ns`: what these clocks said in the external time namespace when the tree was captured;
    `boot_id` and `clock_offsets_ns`: of which boot of which host they were, and how far off its own.
    """

    version: Annotated[int, Meta(ge=1, le=0xFFFF)]
    machine: Annotated[str, Meta(max_length=32)]
    page_size_bytes: U32
    xfeatures: U64
    xstate_size_bytes: U32
    vdso: Annotated[bytes, Meta(min_length=32, max_length=32)]
    kernel: Annotated[str, Meta(max_length=256)]
    created_ns: U64
    root: Pid
    monotonic_ns: U64
    boottime_ns: U64
    boot_id: Annotated[str, Meta(max_length=64)] = ""
    clock_offsets_ns: tuple[I64, I64] = (0, 0)
    #: set where the session of the tree and its terminal are those of a shell outside
    job: ShellJob | None = None


class UserNamespace(Record, frozen=True, kw_only=True, tag="userns"):
    """A user namespace; `index` 0 is the external one and has no parent.

    `uid_map`, `gid_map` and `projid_map` are relative to the parent; empty where not written yet.
    `owner` is the creator's euid, inside the parent. `limits`: what of /proc/sys/user has been set in it.
    """

    index: Index
    parent: Index | None = None
    owner: Id | None = None
    uid_map: Extents = []
    gid_map: Extents = []
    projid_map: Extents = []
    setgroups: Literal["allow", "deny"] = "allow"
    limits: Annotated[dict[str, I32], Meta(max_length=64)] = {}


NamespaceKind = Literal["pid", "mnt", "uts", "ipc", "net", "cgroup", "time"]


class Namespace(Record, frozen=True, kw_only=True, tag="ns"):
    """A namespace of another kind than user.

    `index` counts per image over all kinds. `owner` is a `UserNamespace` index.
    `parent` is for pid namespaces. `state` is the kind's own record (uts names,
    mounts, ipc limits), typed in `pipeline.resources.namespaces`.
    """

    index: Index
    kind: NamespaceKind
    external: bool
    owner: Index = 0
    parent: Index | None = None
    state: dict[str, Any] = {}


class CgroupFile(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Whose a file in a cgroup is, that was handed to somebody; the empty name: the directory itself."""

    name: Annotated[str, Meta(max_length=255)]
    uid: Id
    gid: Id
    mode: U16


class Cgroup(Record, frozen=True, kw_only=True, tag="cgroup"):
    """A cgroup: of the tree's own, or (not `own`) one of the surroundings at which a cgroup namespace begins.

    `hierarchy`: empty for version 2, else its controllers or ``name=…``. `path`: as the cgroup namespace of whoever
    captured it has it. `opened`: controllers for those below (cgroup.subtree_control). `settings`: what is not the
    default, see `pipeline.resources.cgroups.settings`. `xattrs`: user and trusted ones.
    """

    index: Index
    hierarchy: Annotated[str, Meta(max_length=255)]
    path: Path
    own: bool
    threaded: bool = False
    opened: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=64)] = []
    settings: Annotated[dict[str, Small], Meta(max_length=256)] = {}
    files: Annotated[list[CgroupFile], Meta(max_length=256)] = []
    xattrs: Annotated[dict[str, Small], Meta(max_length=64)] = {}


class PathRef(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A path as seen from the root of mount namespace `mntns` (a `Namespace` index)."""

    mntns: Index
    path: Path


class FileIdentity(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a file must be at the destination: the build id where it is ELF, size and mtime else."""

    size_bytes: U64
    mtime_ns: I64
    mode: U32
    build_id: Annotated[bytes, Meta(max_length=64)] = b""


class MappedFile(Record, frozen=True, kw_only=True, tag="mapped"):
    """A file that is mapped by, or is the executable of, some process.

    `writable`: opened read-write for a shared mapping. `content`: the space that
    carries the bytes of a deleted file; `deleted` files live on without a name. `last_name`: it was mapped under
    this name, and `path` is another hard link of it.
    """

    index: Index
    path: PathRef
    identity: FileIdentity
    writable: bool = False
    last_name: Path = b""
    deleted: bool = False
    content: Index | None = None


class AclEntry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A line of an access control list, see acl(5): ACL_USER_OBJ 1, USER 2, GROUP_OBJ 4, GROUP 8, MASK 16, OTHER 32."""

    tag: U16
    permissions: Annotated[int, Meta(ge=0, le=7)]
    uid: Id | None = None
    gid: Id | None = None


class FileAttributes(Record, frozen=True, kw_only=True):
    """What a file has beside its bytes and mode: extended attributes of users, and its access control list."""

    user: Annotated[list[tuple[Annotated[bytes, Meta(max_length=255)], Small]], Meta(max_length=4096)] = []
    acl: Annotated[list[AclEntry], Meta(max_length=4096)] = []


class FileOwner(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Permissions and owner of a file or directory that is made."""

    mode: Annotated[int, Meta(ge=0, le=0o7777)]
    uid: Id
    gid: Id


class TakenFile(Record, frozen=True, kw_only=True, tag="taken"):
    """A file whose content goes along, to be made where it is lacking.

    `content`: the space with its bytes. `above`: the directories that it is in, outermost first.
    """

    index: Index
    path: PathRef
    identity: FileIdentity
    owner: FileOwner
    attributes: FileAttributes = FileAttributes()
    content: Index
    above: Annotated[list[FileOwner], Meta(max_length=2048)] = []


class SharedMemory(Record, frozen=True, kw_only=True, tag="shm"):
    """Memory that several mappings or descriptors share: MAP_SHARED|MAP_ANONYMOUS or a memfd."""

    space: Index
    kind: Literal["anon", "memfd"]
    size_bytes: U64
    name: Path = b""
    seals: U32 = 0
    mode: U32 = 0o777
    uid: Id | None = None
    gid: Id | None = None
    #: bytes of a page where it consists of huge pages of hugetlbfs
    hugetlb: U32 = 0
    #: memfd only: how the restorer opens it for mappings
    exec_sealed: bool = False


VmaKind = Literal["anon", "file", "shared", "sysv", "aio", "vdso", "vvar", "vvar_vclock", "vsyscall"]


class Vma(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One mapping. Addresses and lengths in bytes, page aligned.

    `prot`: PROT_* bits. `flags`: MAP_SHARED or MAP_PRIVATE, with MAP_GROWSDOWN,
    MAP_NORESERVE, MAP_HUGETLB. `backing`: a `MappedFile` index for kind ``file``,
    the space of a `SharedMemory` for kind ``shared``, or of a segment of the process's ipc namespace for kind
    ``sysv``. `advice`: MADV_* values to
    replay. `locked`: by mlock2(2), with all of its pages or as they are touched. `sealed`: by mseal(2).
    """

    start: U64
    end: U64
    kind: VmaKind
    prot: U8
    flags: U32
    offset: U64 = 0
    backing: Index | None = None
    name: Path = b""
    advice: list[U8] = []
    locked: Literal["", "now", "onfault"] = ""
    sealed: bool = False
    #: guard regions inside (MADV_GUARD_INSTALL): [start, end) pairs
    guards: list[tuple[U64, U64]] = []
    #: maximal protection differs: a shared mapping of a file opened read-only
    readonly_file: bool = False


class AioRing(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A context of asynchronous I/O: where its ring is mapped, head, tail, and the unread events, the oldest first."""

    start: U64
    pages: Annotated[int, Meta(ge=1, le=1 << 18)]
    head: U32
    tail: U32
    events: Annotated[bytes, Meta(max_length=1 << 24)] = b""


class AddressSpace(Record, frozen=True, kw_only=True, tag="mm"):
    """The memory of one process. `space` names it in page frames.

    `copy_of`: the space of the parent process, where pages that are equal there
    and here were not sent twice and are to be shared copy-on-write.
    `layout`: start_code, end_code, start_data, end_data, start_brk, brk,
    start_stack, arg_start, arg_end, env_start, env_end (prctl_mm_map order).
    """

    space: Index
    vmas: Annotated[list[Vma], Meta(max_length=1 << 20)]
    exe: Index
    layout: Annotated[list[U64], Meta(min_length=11, max_length=11)]
    auxv: Annotated[bytes, Meta(max_length=4096)]
    dumpable: U8 = 1
    thp_disable: U8 = 0
    coredump_filter: U32 = 0x33
    #: PR_GET_MDWE, PR_GET_MEMORY_MERGE, registrations of membarrier(2)
    mdwe: U8 = 0
    merge: U8 = 0
    membarrier: U32 = 0
    copy_of: Index | None = None
    #: page ranges [start, end) of `copy_of` that are *absent* here and must be dropped after the fork
    dropped: list[tuple[U64, U64]] = []
    #: page ranges whose content comes when the tree runs already (post-copy): never in an image that is stored
    later: list[tuple[U64, U64]] = []
    #: a userfaultfd answers for page faults of it, or may at any time: nobody else can
    answers: bool = False
    #: of the mappings of kind ``aio``
    rings: Annotated[list[AioRing], Meta(max_length=1 << 16)] = []


class Absent(Record, frozen=True, kw_only=True, tag="absent"):
    """What is to be said of an address space when its record is on its way already: see its `dropped` and `later`.

    The destination of a live migration begins with the records while it is reckoned which pages it lacks.
    """

    space: Index
    dropped: list[tuple[U64, U64]] = []
    later: list[tuple[U64, U64]] = []


class Unchanged(Record, frozen=True, kw_only=True, tag="unchanged"):
    """In place of `count` records: they are those of the draft from number `first` on, in its order, from 0.

    Only of a live migration (see `pipeline.image.delta`): never in an image.
    """

    first: Index
    count: Annotated[int, Meta(ge=1, le=1 << 24)]


class SignalAction(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """`struct kernel_sigaction`: handler address, SA_* flags, restorer address, mask."""

    handler: U64
    flags: U64
    restorer: U64
    mask: U64


class PendingSignal(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A queued signal: the 128 bytes of its siginfo_t and its sender, where the siginfo names one.

    `pid` is the level-0 pid of the sender inside the tree, 0 where it is outside.
    """

    info: Annotated[bytes, Meta(min_length=128, max_length=128)]
    uid: Id | None = None
    pid: Pid | None = None


class Credentials(Record, frozen=True, kw_only=True):
    """All ids and capabilities of a task, relative to its user namespace.

    `uids`/`gids`: real, effective, saved, filesystem. `caps`: inheritable,
    permitted, effective, bounding, ambient as bit sets.
    """

    userns: Index
    uids: Annotated[list[Id], Meta(min_length=4, max_length=4)]
    gids: Annotated[list[Id], Meta(min_length=4, max_length=4)]
    groups: Annotated[list[Id], Meta(max_length=65536)]
    caps: Annotated[list[U64], Meta(min_length=5, max_length=5)]
    securebits: U32
    no_new_privs: bool


class Scheduling(Record, frozen=True, kw_only=True):
    """`struct sched_attr` fields, CPU affinity as a list of processor numbers, and ioprio."""

    policy: U32
    flags: U64
    nice: I32
    priority: U32
    runtime_ns: U64
    deadline_ns: U64
    period_ns: U64
    affinity: Annotated[list[U32], Meta(max_length=8192)]
    ioprio: U32


class Seccomp(Record, frozen=True, kw_only=True):
    """Mode 0 off, 1 strict, 2 filter; `filters` in order of installation, 8 bytes an instruction.

    `log`: SECCOMP_FILTER_FLAG_LOG of each filter.
    """

    mode: U8 = 0
    filters: list[Small] = []
    log: list[bool] = []


class Rseq(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A registered restartable-sequences area."""

    address: U64
    size_bytes: U32
    signature: U32
    flags: U32


class Place(Record, frozen=True, kw_only=True):
    """Where in the file system a thread is that does not share that with its process (unshare(CLONE_FS)).

    Each field is one of `Process`, too.
    """

    cwd: PathRef
    cwd_removed: FileOwner | None = None
    cwd_of_ended: bool = False
    root: PathRef
    root_of_ended: bool = False
    umask: U32


class Thread(Record, frozen=True, kw_only=True):
    """One task. `pids` outermost first, one per pid namespace level of the tree."""

    pids: Annotated[list[Pid], Meta(min_length=1, max_length=33)]
    comm: Annotated[bytes, Meta(max_length=15)]
    registers: Annotated[bytes, Meta(max_length=1024)]
    xstate: Annotated[bytes, Meta(max_length=1 << 16)]
    sigmask: U64
    pending: Annotated[list[PendingSignal], Meta(max_length=65536)] = []
    altstack: tuple[U64, U32, U64] = (0, 2, 0)
    tid_address: U64 = 0
    robust_list: tuple[U64, U64] = (0, 24)
    rseq: Rseq | None = None
    credentials: Credentials
    scheduling: Scheduling
    seccomp: Seccomp = Seccomp()
    pdeathsig: U8 = 0
    personality: U32 = 0
    timer_slack_ns: U64 = 50_000
    #: PR_MCE_KILL_GET; get_mempolicy(2): mode and mask of nodes
    mce_kill: U8 = 2
    #: PR_GET_TSC: reading the time stamp counter is a fault
    no_tsc: bool = False
    memory_policy: U32 = 0
    memory_nodes: Annotated[bytes, Meta(max_length=128)] = b""
    #: the `Cgroup` indexes, where they are others than those of the process
    cgroups: Annotated[list[Index], Meta(max_length=64)] | None = None
    #: None for that of its process
    place: Place | None = None
    #: exit code of a first thread that has ended while others of its process run
    ended: U8 | None = None
    #: time left of a relative sleep that was interrupted (restart block), None where not known
    sleep_left_ns: U64 | None = None


class PosixTimer(Record, frozen=True, kw_only=True):
    """A timer_create(2) timer: /proc/PID/timers plus timer_gettime."""

    id: I32
    clock: I32
    notify: I32
    signal: I32
    sigval: U64
    thread: Pid | None = None
    interval_ns: U64
    value_ns: U64


class FdEntry(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A slot of a descriptor table: number, `OpenFile` index, FD_CLOEXEC."""

    fd: Annotated[int, Meta(ge=0, le=1 << 24)]
    file: Index
    cloexec: bool


class Memberships(Record, frozen=True, kw_only=True):
    """The namespaces a process is in: `UserNamespace` index for `user`, `Namespace` indexes else."""

    user: Index
    pid: Index
    pid_for_children: Index
    mnt: Index
    uts: Index
    ipc: Index
    net: Index
    cgroup: Index
    time: Index
    time_for_children: Index


class SemaphoreUndo(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is added to a semaphore when a process ends: set of its ipc namespace, number in the set."""

    set: I32
    number: U16
    adjustment: Annotated[int, Meta(ge=-0x8000, le=0x7FFF)]


class Together(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a process shares with another one by clone(2): a level-0 pid for each thing, 0 where it has its own.

    Of all that share a thing the first in the tree has it, and the others name that one: the address space
    (CLONE_VM), the descriptor table (CLONE_FILES), root, working directory and umask (CLONE_FS), the signal
    actions (CLONE_SIGHAND), the semaphore adjustments (CLONE_SYSVSEM).
    """

    vm: Pid = 0
    files: Pid = 0
    fs: Pid = 0
    sighand: Pid = 0
    sysvsem: Pid = 0


class Key(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A key of type ``user``; `permissions` as keyctl_setperm(3) has them."""

    description: Annotated[bytes, Meta(min_length=1, max_length=4095)]
    payload: Annotated[bytes, Meta(min_length=1, max_length=32767)]
    uid: Id
    gid: Id
    permissions: U32


class SessionKeyring(Record, frozen=True, kw_only=True):
    """A session keyring with keys; `number` tells it from others. `with_user`: the user's keyring is linked to it."""

    number: I32
    permissions: U32
    uid: Id
    gid: Id
    with_user: bool = False
    keys: Annotated[list[Key], Meta(max_length=64)] = []


class Process(Record, frozen=True, kw_only=True, tag="process"):
    """One process. pids as in `Thread`; `parent`, `pgid`, `sid` are level-0 pids, 0 = outside the tree."""

    pids: Annotated[list[Pid], Meta(min_length=1, max_length=33)]
    parent: Pid
    pgid: Pid
    sid: Pid
    #: session and group as every level of `pids` sees them; 0 where they are led from further out
    sids: Annotated[list[Pid], Meta(max_length=33)] = []
    pgids: Annotated[list[Pid], Meta(max_length=33)] = []
    state: Literal["running", "stopped", "zombie"]
    #: wait status of a zombie (as WEXITSTATUS/WTERMSIG read it)
    exit_status: U32 = 0
    exit_signal: U8 = 17
    #: signal that stopped it, for state "stopped"
    stop_signal: U8 = 0
    #: what its parent in the tree could still collect by waitid(2), besides its end
    notice: Literal["", "stopped", "continued"] = ""
    namespaces: Memberships
    together: Together = Together()
    space: Index | None = None
    fds: Annotated[list[FdEntry], Meta(max_length=1 << 20)] = []
    cwd: PathRef | None = None
    #: the working directory was removed: it is made once more under that name, and removed
    cwd_removed: FileOwner | None = None
    #: it is of a process that has ended, in /proc: nothing can be found in it
    cwd_of_ended: bool = False
    root: PathRef | None = None
    root_of_ended: bool = False
    umask: U32 = 0o022
    actions: Annotated[list[SignalAction], Meta(max_length=64)] = []
    pending: Annotated[list[PendingSignal], Meta(max_length=65536)] = []
    #: RLIMIT number -> (soft, hard), RLIM_INFINITY as 2**64-1
    limits: Annotated[list[tuple[U64, U64]], Meta(max_length=32)] = []
    #: ITIMER_REAL, VIRTUAL, PROF: (interval_us, value_us)
    itimers: Annotated[list[tuple[U64, U64]], Meta(max_length=3)] = []
    timers: Annotated[list[PosixTimer], Meta(max_length=65536)] = []
    undo: Annotated[list[SemaphoreUndo], Meta(max_length=1 << 20)] = []
    oom_score_adj: I32 = 0
    #: of its session, where that is the tree's
    autogroup_nice: Annotated[int, Meta(ge=-20, le=19)] = 0
    child_subreaper: bool = False
    #: leader first; empty for a zombie
    threads: Annotated[list[Thread], Meta(max_length=1 << 16)] = []
    comm: Annotated[bytes, Meta(max_length=15)] = b""
    #: ids of a zombie, which has no thread that could say them
    credentials: Credentials | None = None
    #: as whom somebody logged in, see loginuid(5); None for nobody
    loginuid: Id | None = None
    #: the tree's own cgroups that it is in; elsewhere it is in one of the surroundings
    cgroups: Annotated[list[Index], Meta(max_length=64)] = []
    #: if it is one of the tree's with keys in it
    session_keyring: SessionKeyring | None = None


class Owner(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """F_SETOWN_EX: type (F_OWNER_TID 0, PID 1, PGRP 2), level-0 pid; F_SETSIG signal; who said so (None: not known)."""

    type: U8
    pid: Pid
    signal: U8
    uid: Id | None = None
    euid: Id | None = None


class OpenFile(Record, frozen=True, kw_only=True, tag="file"):
    """An open file description, shared by all `FdEntry` that name it.

    `flags`: F_GETFL. `state`: the record of `kind`, see `pipeline.resources`.
    """

    index: Index
    kind: Annotated[str, Meta(max_length=32)]
    flags: U32
    position: U64 = 0
    owner: Owner | None = None
    state: dict[str, Any] = {}


class Content(Record, frozen=True, kw_only=True, tag="content"):
    """Bytes of a file that travel as page frames of `space` (a deleted file, mostly)."""

    space: Index
    size_bytes: U64


class Layer(Record, frozen=True, kw_only=True, tag="layer"):
    """An object of page frames that an image needs besides its own.

    `at`: the place it is in: a URL, a path from the directory of the image, or empty: that of the image itself.
    `name`: of the object. `digest`: that of its end record.
    """

    index: Index
    at: Annotated[str, Meta(max_length=4096)] = ""
    name: Annotated[str, Meta(min_length=1, max_length=255)]
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]


class Stored(Record, frozen=True, kw_only=True, tag="stored"):
    """Pages of a space that lie in a layer, whose frames call the space `number`.

    `runs`: page ranges [start, end), ascending. Of several frames with the same page the last one counts, and what the
    image itself has of the page counts more.
    """

    space: Index
    layer: Index
    number: Index
    runs: list[tuple[U64, U64]]


class End(Record, frozen=True, kw_only=True, tag="end"):
    """Last record: the number of records and page bytes before it, so that a cut is seen."""

    records: U64
    page_bytes: U64
    #: xxh3_128 over head and header of every frame before this one (heads hold the sums of payloads)
    digest: Annotated[bytes, Meta(min_length=16, max_length=16)]


AnyRecord = (
    Head
    | UserNamespace
    | Namespace
    | Cgroup
    | MappedFile
    | TakenFile
    | SharedMemory
    | AddressSpace
    | Absent
    | Unchanged
    | Process
    | OpenFile
    | Content
    | Layer
    | Stored
    | End
)
