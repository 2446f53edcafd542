"""Parsers of /proc, against a real process and against what the kernel may print."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
import threading

import pytest

from pipeline.ids import HostPid
from pipeline.kernel import procfs
from tests.harness.tree import has_kernel_threads

ME = HostPid(os.getpid())


def test_status_of_ourselves() -> None:
    status = procfs.status(ME)
    assert (status.pid, status.tgid, status.ppid) == (ME, ME, os.getppid())
    assert status.uids[:3] == os.getresuid()
    assert status.gids[:3] == os.getresgid()
    assert set(status.groups) == set(os.getgroups())
    assert (status.ns_pgid[0], status.ns_sid[0]) == (os.getpgid(0), os.getsid(0))
    assert status.threads == len(os.listdir("/proc/self/task"))
    assert status.state in "RS"
    assert status.tracer_pid == 0
    assert status.ignored >> (signal.SIGPIPE - 1) & 1
    old_handler = signal.signal(signal.SIGUSR1, lambda *_: None)
    assert procfs.status(ME).caught >> (signal.SIGUSR1 - 1) & 1
    signal.signal(signal.SIGUSR1, old_handler)
    old = os.umask(0o027)
    assert procfs.status(ME).umask == 0o027
    os.umask(old)


def test_odd_names_in_status_and_stat() -> None:
    body = "import sys; open('/proc/self/comm', 'wb').write(b'a) R (\\n\\\\ 1'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", body], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout
        child.stdout.readline()
        pid = HostPid(child.pid)
        assert procfs.status(pid).name == b"a) R (\n\\ 1"
        stat = procfs.stat(pid)
        assert stat.comm == b"a) R (\n\\ 1"
        assert (stat.pid, stat.ppid, stat.exit_signal, stat.num_threads) == (pid, ME, signal.SIGCHLD, 1)
        assert stat.arg_start < stat.arg_end <= stat.env_start < stat.env_end
        assert procfs.cmdline(pid) == [sys.executable.encode(), b"-c", body.encode()]
        child.kill()


def test_a_zombie_and_what_is_gone() -> None:
    child = os.fork()
    if child == 0:
        os._exit(3)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    pid = HostPid(child)
    status = procfs.status(pid)
    assert (status.state, status.umask) == ("Z", None)
    assert procfs.stat(pid).exit_code == 3 << 8
    assert procfs.cmdline(pid) == []
    assert pid in procfs.children(ME)
    with pytest.raises(FileNotFoundError):
        procfs.read_link(pid, "exe")
    os.waitpid(child, 0)
    for read in (procfs.status, procfs.stat, procfs.tasks, procfs.children, procfs.limits, procfs.comm):
        with pytest.raises(procfs.ProcessGone) as gone:
            read(pid)
        assert gone.value.pid == pid
    assert pid not in procfs.children(ME)


def test_children_of_a_thread_belong_to_the_process() -> None:
    made: list[subprocess.Popen[bytes]] = []

    def fork() -> None:
        made.append(subprocess.Popen(["sleep", "100"]))
        done.wait()

    done = threading.Event()
    thread = threading.Thread(target=fork)
    thread.start()
    while not made:
        pass
    try:
        assert made[0].pid in procfs.children(ME)
        assert set(procfs.tasks(ME)) >= {ME, thread.native_id}
    finally:
        made[0].kill()
        made[0].wait()
        done.set()
        thread.join()


def test_limits_in_order() -> None:
    found = procfs.limits(ME)
    for number in range(16):
        expected = tuple(v & procfs.RLIM_INFINITY for v in resource.getrlimit(number))
        assert found[number] == expected


def test_fdinfo_keeps_repeated_words() -> None:
    epoll = select.epoll()
    pipes = [os.pipe() for _ in range(2)]
    for reader, _ in pipes:
        epoll.register(reader, select.EPOLLIN)
    info = procfs.fdinfo(ME, epoll.fileno())
    assert {line.split()[0] for line in info["tfd"]} == {str(reader) for reader, _ in pipes}
    assert info["pos"] == ["0"]
    assert int(info["flags"][0], 8) & os.O_CLOEXEC
    epoll.close()
    for ends in pipes:
        for end in ends:
            os.close(end)
    with pytest.raises(FileNotFoundError):
        procfs.fdinfo(ME, 99999)


def test_timers() -> None:
    content = (
        b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n"
        b"ID: 0\nsignal: 0/0000000000000000\nnotify: thread/tid.77\nClockID: -6\n"
    )
    assert procfs.parse_timers(content) == [
        procfs.Timer(1, 60, 0x7FFF86E452A8, 0, None, 0),
        procfs.Timer(0, 0, 0, 2, 77, -6),
    ]
    assert procfs.timers(ME) == []
    with pytest.raises(ValueError, match="unknown form"):
        procfs.parse_timers(content.replace(b"notify: thread", b"notify: other"))


@pytest.mark.skipif(not has_kernel_threads(), reason="no kernel thread in this pid namespace")
def test_kernel_threads_are_known() -> None:
    assert procfs.is_kernel_thread(HostPid(2))


def test_auxv_of_ourselves() -> None:
    auxv = procfs.auxv(ME)
    assert len(auxv) % 16 == 0
    assert auxv.endswith(bytes(16))
    assert not procfs.is_kernel_thread(ME)
    assert procfs.coredump_filter(ME) & 1
    assert b"PATH=" in procfs.environ(ME)


def test_threads_are_listed_although_one_takes_over_the_number_of_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While an execve of another thread does so, there is no directory for a moment, but still a process."""
    listdir, missing = os.listdir, [FileNotFoundError(errno.ENOENT, "it is being replaced")] * 2

    def interrupted(path: str) -> list[str]:
        if missing:
            raise missing.pop()
        return listdir(path)

    monkeypatch.setattr(os, "listdir", interrupted)
    assert os.getpid() in procfs.tasks(HostPid(os.getpid()))
    assert not missing
