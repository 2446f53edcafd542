"""What a file has beside its bytes, mode and owner: extended attributes of users, and access control lists.

The kernel stores names and values; the list in ``system.posix_acl_access`` names uids and gids, and is shown with the
numbers of whoever reads it: they are translated like every other id. Not carried: what only the system gives
(``trusted.``, ``security.``: labels, capabilities of programs).

Sources: xattr(7), acl(5); include/uapi/linux/posix_acl_xattr.h.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from pipeline.image.schema import AclEntry, FileAttributes, Id

_USER = "user."
_ACL = "system.posix_acl_access"
_VERSION = struct.pack("<I", 2)
_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 2, 8
_NOBODY = 0xFFFF_FFFF

#: numbers an id as the file system at hand wants it
Number = Callable[[Id], int]


def captured(fd: int, user: Callable[[int], Id], group: Callable[[int], Id]) -> FileAttributes:
    """The attributes of the file behind a local descriptor, O_PATH too."""
    name = f"/proc/self/fd/{fd}"
    try:
        names = os.listxattr(name)
        found = [(os.fsencode(one), os.getxattr(name, one)) for one in sorted(names) if one.startswith(_USER)]
        acl = os.getxattr(name, _ACL) if _ACL in names else b""
    except OSError as error:  # a filesystem without extended attributes has none to lose
        if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA):
            raise
        return FileAttributes()
    entries = []
    for tag, permissions, number in _ENTRY.iter_unpack(acl[len(_VERSION) :]):
        uid = user(number) if tag == _ACL_USER else None
        gid = group(number) if tag == _ACL_GROUP else None
        entries.append(AclEntry(tag, permissions & 7, uid, gid))
    return FileAttributes(user=found, acl=entries)


def give(fd: int, wanted: FileAttributes, user: Number, group: Number) -> None:
    """Give them to the file behind a local descriptor.

    Raises:
        OSError: the filesystem, or the kernel, does not take them.
    """
    for name, value in wanted.user:
        if not name.startswith(os.fsencode(_USER)) or b"\0" in name:
            raise PermissionError(errno.EPERM, f"{os.fsdecode(name)} is no attribute of users")
        os.setxattr(fd, name, value)
    if wanted.acl:
        lines = [
            _ENTRY.pack(
                one.tag,
                one.permissions,
                user(one.uid) if one.uid is not None else group(one.gid) if one.gid is not None else _NOBODY,
            )
            for one in wanted.acl
        ]
        os.setxattr(fd, _ACL, _VERSION + b"".join(lines))
