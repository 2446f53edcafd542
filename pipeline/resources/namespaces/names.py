"""uts namespaces: host name and NIS domain name, captured by a visitor that joins the namespace.

Source: uts_namespaces(7).
"""

from __future__ import annotations

from pipeline.image.schema import Record
from pipeline.kernel.arch.x86_64 import NR
from pipeline.remote.puppet import Puppet
from pipeline.resources.support import Support
from pipeline.userns.visit import Way, read_file, visit

SUPPORT = Support(
    "uts",
    carried=("host name and domain name",),
    refused=(),
    shown_by=("resources/test_namespaces_names.py",),
)


class UtsState(Record, frozen=True, kw_only=True):
    """Host and NIS domain name."""

    hostname: bytes
    domainname: bytes


def capture_uts(way: Way) -> UtsState:
    """The names, as a visitor sees them."""

    def look() -> bytes:
        return read_file("/proc/sys/kernel/hostname") + b"\0" + read_file("/proc/sys/kernel/domainname")

    hostname, domainname = visit(way, look).split(b"\0")
    return UtsState(hostname=hostname.rstrip(b"\n"), domainname=domainname.rstrip(b"\n"))


def create_uts(state: UtsState, keeper: Puppet) -> None:
    """Set the names in the namespace that `keeper` has just made."""
    keeper.syscall(NR.sethostname, state.hostname, len(state.hostname))
    keeper.syscall(NR.setdomainname, state.domainname, len(state.domainname))
