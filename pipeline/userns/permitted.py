"""What stands in a plain user's way to user namespaces and subordinate ids, and what an administrator does.

Who asks has been refused by the kernel, or is told by a row of `check`: the text names the setting that says no
*here*, with the command that changes it. A setting that this kernel does not have is not mentioned.

Sources: user_namespaces(7), subuid(5), usermod(8); kernel.unprivileged_userns_clone is Debian's,
kernel.apparmor_restrict_unprivileged_userns is Ubuntu's.
"""

from __future__ import annotations

import errno
import os
import pwd
import shutil
from collections.abc import Sequence
from pathlib import Path

_MAX_NAMESPACES = Path("/proc/sys/user/max_user_namespaces")
#: settings that forbid user namespaces to plain users where they are not the second value
_SWITCHES = (("kernel/unprivileged_userns_clone", "1"), ("kernel/apparmor_restrict_unprivileged_userns", "0"))
_FIRST_SUBORDINATE = 100_000
#: what a distribution gives a new user
USUAL_RANGE = 65_536


def user_name(uid: int | None = None) -> str:
    """The login name of a uid (ours), or the number where it has none."""
    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def subordinate_ranges(path: str, user: str, uid: int) -> list[tuple[int, int]]:
    """The (first id, count) ranges that subuid(5) or subgid(5) grants to a user."""
    return [(first, count) for name, first, count in _granted(path) if name in (user, str(uid))]


def _granted(path: str) -> list[tuple[str, int, int]]:
    """Every line of subuid(5) or subgid(5): user, first id, count."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, PermissionError):
        return []
    for line in lines:
        fields = line.split(":")
        if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
            found.append((fields[0], int(fields[1]), int(fields[2])))
    return found


def ask_for_namespaces(refusal: OSError) -> str:
    """What an administrator does, so that unshare(CLONE_NEWUSER), which ended with `refusal`, is permitted."""
    if refusal.errno == errno.ENOSPC:
        most = _read(_MAX_NAMESPACES) or "?"
        return (
            f"the limit of user namespaces is reached (user.max_user_namespaces is {most} here; or 33 levels deep): "
            f"as root: sysctl -w user.max_user_namespaces={max(10_000, 2 * int(most) if most.isdigit() else 0)}"
        )
    closed = []
    for name, open_value in _SWITCHES:
        value = _read(Path("/proc/sys") / name)
        if value is not None and value != open_value:
            closed.append(f"sysctl -w {name.replace('/', '.')}={open_value}")
    if closed:
        return f"as root: {'; '.join(closed)}"
    return (
        "a seccomp filter, a security module or a root directory of its own (chroot) forbids it: start this "
        "outside of that container or sandbox, or have it permit unshare(2)"
    )


def ask_for_ranges(count: int = USUAL_RANGE, kinds: Sequence[str] = ("uid", "gid")) -> str:
    """What an administrator does, so that this user has `count` subordinate ids in one piece; `kinds`: uid, gid."""
    user, name = user_name(), ""
    if user.isdigit():  # newuidmap asks for a name
        user, name = "NAME", f"useradd --uid {user} NAME; "
    words = []
    for kind in kinds:
        ends = [first + size for _, first, size in _granted(f"/etc/sub{kind}")]
        first = max([_FIRST_SUBORDINATE, *ends])
        words.append(f"--add-sub{kind}s {first}-{first + count - 1}")
    tools = "" if has_tools() else f"{ask_for_tools()}; "
    return f"as root: {tools}{name}usermod {' '.join(words)} {user}"


def has_tools() -> bool:
    """Whether newuidmap and newgidmap are there to be run."""
    return bool(shutil.which("newuidmap") and shutil.which("newgidmap"))


def ask_for_tools() -> str:
    """How newuidmap and newgidmap come to a host."""
    return "install newuidmap and newgidmap (Debian: apt-get install uidmap)"


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return None
