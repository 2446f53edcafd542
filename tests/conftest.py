"""Fixtures of all tests: nothing is left behind by any of them, and skips can be made failures.

``PIPELINE_TEST_STRICT=1`` turns every skip into a failure: on a machine that is known to
have everything, a test that does not run is a defect. ``PIPELINE_TEST_SLOW=10``: it is ten times slower than others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.harness import huge_pages, object_store
from tests.harness.hosts import Host, two_hosts, write_secret
from tests.harness.leaks import Inventory, become_subreaper
from tests.harness.settings import DEPTH_0, Setting
from tests.harness.tree import Tree, Workshop

STRICT = os.environ.get("PIPELINE_TEST_STRICT") == "1"


def pytest_configure(config: pytest.Config) -> None:
    become_subreaper()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if STRICT and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"PIPELINE_TEST_STRICT: skipped: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if STRICT and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"PIPELINE_TEST_STRICT: skipped: {report.longrepr[2]}"
    return report


@pytest.fixture(scope="session")
def temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """TMPDIR of this session and of everything it starts: empty again after every test."""
    tmp_path_factory.getbasetemp()  # pytest's own tmp_path directories stay outside of it
    path = Path(tempfile.mkdtemp(prefix="pipeline-tmp-", dir="/tmp"))
    path.chmod(0o1777)
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(path)
    yield path
    tempfile.tempdir = before[1]
    if before[0] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[0]
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    """The endpoint of an S3 server; None where none is installed."""
    with object_store.running(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_server: str | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, for who uses it: in the environment of this process and of what it starts."""
    object_store.use(s3_server, monkeypatch)
    assert s3_server is not None
    return s3_server


@pytest.fixture(autouse=True)
def nothing_left_behind(temporary_directory: Path) -> Iterator[None]:
    """Fails the test that leaves a process, mount, descriptor, temporary file or network namespace."""
    inventory = Inventory.take(temporary_directory)
    yield
    leaks = inventory.leaks()
    if leaks:
        pytest.fail("left behind:\n" + "\n".join(f"  {leak}" for leak in leaks), pytrace=False)


@pytest.fixture(scope="session")
def workshop() -> Iterator[Workshop]:
    """The test programs, copied and compiled where every uid can execute them."""
    workshop = Workshop()
    yield workshop
    workshop.remove()


@pytest.fixture
def start(nothing_left_behind: None, workshop: Workshop) -> Iterator[Callable[..., Tree]]:
    """Start a program: ``start(program, setting, arguments)``; whatever is left of it is killed at the end."""
    with ExitStack() as stack:

        def start(program: str, setting: Setting = DEPTH_0, arguments: Sequence[str] = ()) -> Tree:
            huge_pages.skip_without(program, arguments)
            tree = Tree.start(workshop, program, setting, arguments)
            stack.callback(tree.kill)
            return tree

        yield start


@pytest.fixture(scope="session")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with what both sides of a migration must know."""
    return write_secret(tmp_path_factory.mktemp("secret") / "secret")


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts between which trees move, for all tests of a file."""
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def start_on(nothing_left_behind: None, workshop: Workshop) -> Iterator[Callable[..., Tree]]:
    """Start a program on a host, with pids from 5000 on: ``start_on(host, program, setting, arguments)``.

    Wherever it is at the end, it is killed there.
    """
    with ExitStack() as stack:

        def start_on(
            host: Host, program: str, setting: Setting = DEPTH_0, arguments: Sequence[str] = ()
        ) -> Tree:
            huge_pages.skip_without(program, arguments)
            tree = host.start(workshop, program, setting, 5000, arguments)
            stack.callback(tree.kill)
            return tree

        yield start_on
