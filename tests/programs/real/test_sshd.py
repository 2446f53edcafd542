"""A daemon that people log in to: sshd with a session, its shell on a terminal, and the client, in one network."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.settings import CLONE_NEWNET, CLONE_NEWNS, FIRST, Level, Setting
from tests.programs.real.tree import RealTree, lines_of, needs

pytestmark = pytest.mark.root

#: sshd gives up root for a user whose uid is above 100
_WIDE = Level(("0 0 65536",), ("0 0 65536",))
_KINDS = CLONE_NEWNET | CLONE_NEWNS
SETTINGS = (Setting("depth1", (FIRST,), _KINDS), Setting("depth2", (FIRST, _WIDE), _KINDS))

#: what is typed comes by a pipe with a name; the shell prints through its terminal, sshd, TCP and ssh into `session`
SSHD = r"""
set -eu
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
# terminals whose group it may change
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts
mount --bind /dev/pts/ptmx /dev/ptmx
# an account that is not locked, whatever that of the host is
echo 'root:*:19000::::::' > shadow
mount --bind shadow /etc/shadow
ssh-keygen -q -t ed25519 -N '' -f hostkey
ssh-keygen -q -t ed25519 -N '' -f key
cat > config <<END
Port 2222
ListenAddress 127.0.0.1
HostKey $PWD/hostkey
AuthorizedKeysFile $PWD/key.pub
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
PrintMotd no
END
/usr/sbin/sshd -D -e -f config &
server=$!
mkfifo typed
exec 3<>typed
until ssh-keyscan -t ed25519 -p 2222 127.0.0.1 > known 2> /dev/null && [ -s known ]; do sleep 0.1; done
ssh -tt -i key -p 2222 -o UserKnownHostsFile=known root@127.0.0.1 <&3 > session || echo $? > status
kill $server
wait
"""
LOOP = "i=0; while sleep 0.05; do i=$((i + 1)); echo tick $i; done\n"


@needs("sshd=openssh-server", "ssh=openssh-client", "ip=iproute2")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_a_session_of_sshd(launch: Callable[..., RealTree], setting: Setting, tmp_path: Path) -> None:
    tree = launch(setting, ["sh", "-c", SSHD], lines_of("session"))
    typed = tree.wait_for_file("typed")
    tree.wait("somebody is logged in", lambda: tree.progress(tree.directory) > 0)
    typed.write_text(LOOP)
    tree.goes_on(5)
    tree.all_ways(tmp_path)
    output = tree.directory / "session"

    def prompts() -> bool:
        """Whether ^C has ended the loop; one that comes when a `sleep` has just ended is nobody's, and bash goes on."""
        typed.write_text("\x03")
        time.sleep(0.3)
        return "# " in output.read_text().partition("^C")[2]

    tree.wait("the shell prompts", prompts)
    typed.write_text("echo done $((6 * 7)) on $(tty); exit 9\n")
    tree.finish(None)
    session = output.read_text()
    # Every ^C is echoed, also one that was nobody's.
    lines = re.findall(r"^(?:\^C)*tick (\d+)(?:\^C)*$", session, re.MULTILINE)
    ticks = [int(number) for number in lines]
    assert ticks == list(range(1, len(ticks) + 1)), "a line is lost or doubled"
    assert re.search(r"^done 42 on /dev/pts/\d+$", session, re.MULTILINE), session[-500:]
    assert (tree.directory / "status").read_text() == "9\n"
