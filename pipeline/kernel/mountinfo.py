"""The mounts of a mount namespace, as /proc/PID/mountinfo lists them.

Only mounts below the root directory of `pid` are there, in the order in which they
were made, one on top of the other; ids are unique in the machine while the mount lives.

Source: proc_pid_mountinfo(5); fs/proc_namespace.c.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

import msgspec

from pipeline.ids import HostPid
from pipeline.kernel import procfs

_ESCAPE = re.compile(rb"\\([0-7]{3})")


class Mount(msgspec.Struct, frozen=True):
    """One mount.

    Args:
        id: of the mount; `parent` is the id of the mount it stands on (itself for the top).
        device: st_dev of files on it (as os.makedev; of btrfs: of the whole filesystem).
        root: the directory of the filesystem that is the mount's root.
        point: where it is, seen from the root directory of the process.
        options: per-mount options, `super_options` those of the filesystem.
        shared: peer group it is shared in, or 0.
        master: peer group it is a slave of, or 0.
        propagate_from: nearest dominant peer group below the process's root, or 0.
        unbindable: whether it may not be bind-mounted.
        kind: filesystem type, with subtype (``fuse.sshfs``).
        source: what was mounted; filesystem's own meaning.
    """

    id: int
    parent: int
    device: int
    root: bytes
    point: bytes
    options: tuple[bytes, ...]
    shared: int
    master: int
    propagate_from: int
    unbindable: bool
    kind: bytes
    source: bytes
    super_options: tuple[bytes, ...]


def unescape(text: bytes) -> bytes:
    """Undo the octal escapes (blank, tab, newline, backslash, hash)."""
    return _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), text) if b"\\" in text else text


def parse_mountinfo(content: bytes) -> list[Mount]:
    """Parse the file; ValueError for a line of unknown form.

    Unknown optional fields are passed over, as proc_pid_mountinfo(5) asks for.
    """
    return [_parse_line(line) for line in content.split(b"\n") if line]


@lru_cache(maxsize=1024)
def _parse_line(line: bytes) -> Mount:
    words = line.split(b" ")
    separator = words.index(b"-", 6)
    optional = {key: value for key, _, value in (word.partition(b":") for word in words[6:separator])}
    major, _, minor = words[2].partition(b":")
    kind, source, super_options = words[separator + 1 : separator + 4]
    return Mount(
        id=int(words[0]),
        parent=int(words[1]),
        device=os.makedev(int(major), int(minor)),
        root=unescape(words[3]),
        point=unescape(words[4]),
        options=tuple(words[5].split(b",")),
        shared=int(optional.get(b"shared", 0)),
        master=int(optional.get(b"master", 0)),
        propagate_from=int(optional.get(b"propagate_from", 0)),
        unbindable=b"unbindable" in optional,
        kind=unescape(kind),
        source=unescape(source),
        super_options=tuple(super_options.split(b",")),
    )


def mountinfo(pid: HostPid) -> list[Mount]:
    """Read /proc/PID/mountinfo; empty for a zombie. Raises `procfs.ProcessGone`; EACCES."""
    return parse_mountinfo(procfs.read_file(pid, "mountinfo"))
