"""The login uid of a process: as whom somebody logged in, for the audit system, whatever ids they have taken since.

Children have that of their parent. A process that has none may take any; one that has one needs CAP_AUDIT_CONTROL in
the initial user namespace for another. Only the process itself may write it, so a puppet does, before it enters the
user namespace that it shall be in.

Where it cannot be kept, the restorer's stands for it: that is somebody's login, too. It is said, and stops nothing.
Not preserved: the number of the audit session.

Sources: proc_pid_loginuid(5); audit_set_loginuid in kernel/auditsc.c, proc_loginuid_write in fs/proc/base.c.
"""

from __future__ import annotations

import errno
import os

from pipeline.ids import HostPid
from pipeline.image.schema import Id
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.calls import Call
from pipeline.remote.puppet import Puppet

#: nobody has logged in
_NONE = 0xFFFF_FFFF
_REFUSED = "another than the restorer's takes CAP_AUDIT_CONTROL on the host"


def capture(pid: HostPid) -> Id | None:
    """The login uid as the pipeline sees it (`Id(0, …)`); None where there is none, or no audit system.

    Raises:
        OSError: it cannot be read, or the process has ended.
    """
    number = _number(pid)
    return Id(0, number) if number is not None and number != _NONE else None


def keep(puppet: Puppet, number: int | None) -> str:
    """Give a puppet a login uid.

    Args:
        puppet: not yet in its user namespace, as far as its parent was not.
        number: as the pipeline sees it; None for none.

    Returns:
        Why it was not to be had; empty where the puppet has it.

    Raises:
        OSError: anything else than that it may not.
    """
    wanted = _NONE if number is None else number
    now = _number(puppet.pid)
    if wanted == (_NONE if now is None else now):
        return ""
    if now is None:
        return "this kernel keeps none"
    try:
        fd = os.open(f"/proc/{puppet.pid}/loginuid", os.O_WRONLY | os.O_CLOEXEC)
    except PermissionError:
        return _REFUSED
    try:
        (remote,) = puppet.send_fds([fd])
    finally:
        os.close(fd)
    text = b"%d" % wanted
    attempt = Call(NR.write, (remote, text, len(text)), may_fail=True)
    puppet.run([attempt, Call(NR.close, (remote,))])
    if attempt.result == -errno.EPERM:
        return _REFUSED
    if attempt.result < 0:
        raise OSError(-attempt.result, f"login uid {wanted}: {os.strerror(-attempt.result)}")
    return ""


def _number(pid: HostPid) -> int | None:
    try:
        with open(f"/proc/{pid}/loginuid", "rb") as file:
            return int(file.read())
    except FileNotFoundError:
        return None
