"""Names of sysctls in an image stay below /proc/sys/net, whoever made the image."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import convert, to_builtins
from msgspec.structs import replace

from pipeline.errors import RebuildError
from pipeline.kernel.syscalls import CLONE, unshare
from pipeline.resources.namespaces.network import NetState
from tests.userns.making import captured, held, in_child, making, own_namespace

pytestmark = pytest.mark.root


@pytest.mark.parametrize("form", ["{path}", "../../..{path}", "core/../../../..{path}", "", "."])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, form: str) -> None:
    """No image of ours has one."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")

    def body() -> None:
        unshare(CLONE.NEWNET)
        with held(lambda: unshare(CLONE.NEWNET)) as pid:
            capture, forest = captured(pid)
            network = own_namespace(capture, "net")
        state = convert(network.state, NetState)
        wrong = replace(state, sysctls={form.format(path=victim): b"yours"})
        built = to_builtins(wrong, builtin_types=(bytes,))
        with (
            pytest.raises(RebuildError, match=r"sysctls: .*Invalid argument"),
            making(forest, {network.index: replace(network, state=built)}),
        ):
            pass

    in_child(body)
    assert victim.read_bytes() == b"mine"
