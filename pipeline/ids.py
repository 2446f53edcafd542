"""Names for numbers that must not be mixed up.

A pid, a uid or an address means nothing without saying *whose* it is. These
aliases say it in every signature; they cost nothing at run time.
"""

from __future__ import annotations

from typing import NewType

#: A pid as the pipeline process itself sees it (its own pid namespace).
HostPid = NewType("HostPid", int)
#: A pid inside some pid namespace of the tree.
NsPid = NewType("NsPid", int)
#: A uid or gid as the pipeline process itself sees it (its own user namespace).
HostUid = NewType("HostUid", int)
HostGid = NewType("HostGid", int)
#: An address in the address space of a target or puppet.
RemoteAddress = NewType("RemoteAddress", int)
#: A descriptor number in the table of a target or puppet.
RemoteFd = NewType("RemoteFd", int)
#: A descriptor number in the pipeline's own table.
LocalFd = NewType("LocalFd", int)
