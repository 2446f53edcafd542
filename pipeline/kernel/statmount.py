"""Mounts as statmount(2) tells of them: what mountinfo does not say, which is how an idmapped mount maps ids.

Mounts have two numbers: one that mountinfo shows and that is used again, and one that never is. listmount(2)
gives the second kind, for the mount namespace of the caller.

Sources: statmount(2), listmount(2); include/uapi/linux/mount.h (STATMOUNT_MNT_UIDMAP since Linux 6.16).
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterator

from pipeline.image.schema import Extent
from pipeline.kernel.arch.x86_64 import NR
from pipeline.kernel.syscalls import syscall

_REQUEST = struct.Struct("<IIQQ")
_ROOT = 0xFFFF_FFFF_FFFF_FFFF
_BASIC, _UID_MAP, _GID_MAP = 0x2, 0x2000, 0x4000
_MASK_AT, _OLD_ID_AT, _MAPS_AT, _STRINGS_AT = 8, 56, 152, 512
_ANSWER_BYTES = 1 << 16
_BATCH = 512


def idmap_of(mount_id: int) -> tuple[list[Extent], list[Extent]]:
    """The uid and gid map of an idmapped mount of the caller's mount namespace.

    Args:
        mount_id: as mountinfo shows it.

    Returns:
        Lines: ids of the file system, and what they are shown as, in the user namespace of the caller. What has no
        number there is left out by the kernel.

    Raises:
        OSError: ENOENT: there is no such mount; EOPNOTSUPP: this kernel does not tell.
    """
    for unique in _mounts():
        answer = _statmount(unique, _BASIC)
        if struct.unpack_from("<I", answer, _OLD_ID_AT)[0] == mount_id:
            return _maps(_statmount(unique, _UID_MAP | _GID_MAP))
    raise OSError(errno.ENOENT, f"no mount {mount_id}")


def _mounts() -> Iterator[int]:
    """The numbers of all mounts below the root directory of the caller."""
    last = 0
    while True:
        buffer = ctypes.create_string_buffer(8 * _BATCH)
        count = syscall(NR.listmount, _REQUEST.pack(_REQUEST.size, 0, _ROOT, last), buffer, _BATCH, 0)
        found = struct.unpack_from(f"<{count}Q", buffer)
        yield from found
        if count < _BATCH:
            return
        last = found[-1]


def _statmount(unique: int, what: int) -> bytes:
    answer = ctypes.create_string_buffer(_ANSWER_BYTES)
    syscall(NR.statmount, _REQUEST.pack(_REQUEST.size, 0, unique, what), answer, _ANSWER_BYTES, 0)
    return answer.raw


def _maps(answer: bytes) -> tuple[list[Extent], list[Extent]]:
    (mask,) = struct.unpack_from("<Q", answer, _MASK_AT)
    if mask & (_UID_MAP | _GID_MAP) != _UID_MAP | _GID_MAP:
        raise OSError(errno.EOPNOTSUPP, "the kernel does not tell how a mount maps ids")
    uids, uids_at, gids, gids_at = struct.unpack_from("<4I", answer, _MAPS_AT)
    return _lines(answer, uids, uids_at), _lines(answer, gids, gids_at)


def _lines(answer: bytes, count: int, at: int) -> list[Extent]:
    texts = answer[_STRINGS_AT + at :].split(b"\0", count)[:count]
    return [Extent(*map(int, text.split())) for text in texts]
