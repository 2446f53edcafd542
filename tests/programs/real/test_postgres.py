"""PostgreSQL with pgbench in the tree: no transaction is lost or done twice, no page is torn."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import Setting
from tests.harness.tree import Workshop
from tests.programs.real.postgres import BIN, DEPTH_1, DEPTH_2, adds_up, ask, new_cluster, start_postgres
from tests.programs.real.tree import RealTree, needs

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not BIN.exists(), reason="missing here: postgres (Debian's postgresql)"),
    needs("setpriv=util-linux"),
]


@pytest.fixture(scope="module")
def cluster(workshop: Workshop) -> Path:
    """Copied for each test."""
    return new_cluster(workshop)


@pytest.mark.parametrize(
    ("setting", "address"),
    [(DEPTH_1, None), (DEPTH_2, None), (DEPTH_2, "127.0.0.1")],
    ids=["depth1", "depth2", "depth2-tcp"],
)
def test_postgres_under_load(
    launch: Callable[..., RealTree],
    workshop: Workshop,
    cluster: Path,
    setting: Setting,
    address: str | None,
    tmp_path: Path,
) -> None:
    tree = start_postgres(launch, workshop, cluster, setting, address)
    tree.all_ways(tmp_path)
    adds_up(tree)
    ask(tree, "CREATE EXTENSION amcheck")
    ask(
        tree,
        "SELECT bt_index_check(c.oid, true) FROM pg_class c JOIN pg_am a ON a.oid = c.relam"
        " WHERE a.amname = 'btree' AND c.relkind = 'i'",
    )
    tree.finish(signal.SIGTERM)
    assert "aborted" not in tree.log(), tree.log()
    assert "PANIC" not in tree.log(), tree.log()
