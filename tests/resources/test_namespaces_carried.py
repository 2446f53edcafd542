"""Namespaces with something in them, through a whole dump and restore."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.carry import carry
from tests.harness.settings import CONTAINER, CONTAINER_2, DEPTH_1, Level, Setting
from tests.harness.tree import Tree

pytestmark = pytest.mark.root

TOUCHING = Setting(
    "touching",
    (
        Level(("0 100000 1", "1 200000 1"), ("0 100000 1", "1 200000 1")),
        Level(("0 0 1", "1 1 1"), ("1 1 1", "0 0 1")),
    ),
    CONTAINER,
)

ADDITIONS = """
mount -t tmpfs -o size=1m,mode=1711,nosuid own /srv
mount --bind /usr/share /mnt
mount -o remount,bind,ro,nodev /mnt
mount -t mqueue own /media
echo 4096 > /proc/sys/kernel/msgmax
echo 17 > /proc/sys/fs/mqueue/queues_max
hostname carried
echo 9 > /proc/sys/user/max_user_namespaces
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t tmpfs -o size=4k,ro own /proc/fs
mount --bind /srv /opt
"""
LOOK = """
cat /proc/sys/user/max_user_namespaces /proc/sys/kernel/msgmax /proc/sys/fs/mqueue/queues_max
hostname
stat -c '%a %u %g' /srv /mnt /media
stat -f -c '%T %b' /srv /media
cut -d' ' -f4-6 /proc/self/mountinfo
cat /proc/self/uid_map /proc/self/gid_map
"""


def inside(pid: int, script: str) -> str:
    """Run a script as root inside all namespaces of `pid` but the network's."""
    command = ["nsenter", "-t", str(pid), "-U", "-m", "-u", "-i", "-p", "--", "sh", "-ec", script]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "setting", [DEPTH_1.with_kinds("container1", CONTAINER), CONTAINER_2, TOUCHING], ids=lambda s: s.name
)
def test_a_furnished_container_is_carried(
    start: Callable[..., Tree], tmp_path: Path, setting: Setting
) -> None:
    tree = start("processes", setting)
    inside(tree.pids()[-1], ADDITIONS)
    before = inside(tree.pids()[-1], LOOK)
    carry(tree, tmp_path / "image")
    assert inside(tree.pids()[-1], LOOK) == before
    assert "carried" in before
