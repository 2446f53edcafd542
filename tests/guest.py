"""Runs a command on another kernel: in a virtual machine that sees the files of this one, and changes none of them.

``python -m tests.guest --kernel DIRECTORY -- COMMAND``: DIRECTORY is an unpacked package of a kernel
(``boot/vmlinuz-*``, ``lib/modules/*``), such as `make test-debian-kernel` fetches. What the command prints is
printed; its exit code is ours, and 125 if the guest did not come that far.

The guest's root is an overlay of the files here (virtiofs, read-only) and of its own memory, so the virtual
environment, the packages and the tests are the same. It has no network but a loopback. There need be no processor
with virtualization: qemu does without, some ten times slower.

Root only, for virtiofsd. Everything is started here and ended with us.
"""

from __future__ import annotations

import argparse
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

#: in Debian 12, and in later ones
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
BUSYBOX = "/bin/busybox"
TOOLS = ("qemu-system-x86_64", "cpio", "depmod", "modprobe", BUSYBOX)
#: what it takes to mount the root of the guest
MODULES = ("virtio_pci", "virtiofs", "overlay", "virtio-rng")
SIZE = "6G"
#: of hugetlbfs, of 2 MiB
HUGE_PAGES = 340
_WAIT_S = 10.0

#: the guest has its own
_PLACES = ("dev/shm", "tmp", "run")

#: run by busybox, on the files of the initramfs
INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in $(cat /order); do insmod /modules/$module; done
mount -t virtiofs -o ro root /lower && mount -t tmpfs -o size=75% memory /upper
mkdir /upper/files /upper/work
mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root || poweroff -f
cd /root
mount -t proc proc proc; mount -t sysfs sysfs sys; mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm dev/mqueue
{keep}
mount -t devpts -o ptmxmode=666 pts dev/pts; mount -t mqueue mqueue dev/mqueue
for place in {places}; do mount -t tmpfs -o mode=1777 memory $place; done
{bring_back}
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir run/guest; mount -t virtiofs guest run/guest
exec switch_root /root /bin/sh /run/guest/start
"""

#: run by the shell of the files here, as the first process
START = """
mount --make-rshared /
mkdir -p /lib/modules && mount --bind {modules} /lib/modules
ip link set lo up
# of a program's memory only what it asks for: pages that a huge one brings along are compared, too
echo madvise > /sys/kernel/mm/transparent_hugepage/enabled
echo {huge_pages} > /proc/sys/vm/nr_hugepages
cd {directory}
echo "$(uname -r), $(nproc) processors" > /dev/console
setsid env {environment} {command} < /dev/null > /run/guest/output 2>&1
echo $? > /run/guest/code
sync
echo o > /proc/sysrq-trigger
sleep 60
"""


def unpack_modules(kernel: Path, version: str, to: Path) -> None:
    """Put what mounts the root of the guest into an initramfs, and the order in which it is loaded."""
    subprocess.run(["depmod", "-b", kernel, version], check=True)
    found: dict[str, Path] = {}
    for module in MODULES:
        done = subprocess.run(
            ["modprobe", "--dirname", kernel, "--set-version", version, "--show-depends", module],
            capture_output=True,
            text=True,
            check=True,
        )
        for line in done.stdout.splitlines():
            if line.startswith("insmod "):
                path = Path(line.split()[1])
                found.setdefault(path.name.removesuffix(".xz"), path)
    (to / "modules").mkdir()
    for name, path in found.items():
        data = path.read_bytes()
        (to / "modules" / name).write_bytes(lzma.decompress(data) if path.suffix == ".xz" else data)
    (to / "order").write_text("\n".join(found))


def init_of(directory: Path) -> str:
    """What the guest begins with, to run something in `directory`, which is seen where its own files are, too."""
    keep = bring_back = ":"
    if any(Path("/", place) in directory.parents for place in _PLACES):
        there = shlex.quote(f"/root{directory}")
        keep = f"mkdir /here; mount -o bind {there} /here"
        bring_back = f"mkdir -p {there}; mount -o move /here {there}"
    return INIT.format(keep=keep, bring_back=bring_back, places=" ".join(_PLACES))


def make_initramfs(kernel: Path, version: str, work: Path) -> Path:
    """The first files of the guest, which load modules and go over to the files here."""
    tree = work / "initramfs"
    for name in ("bin", "proc", "sys", "dev", "lower", "upper", "root"):
        (tree / name).mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    (tree / "init").write_text(init_of(Path.cwd()))
    (tree / "init").chmod(0o755)
    unpack_modules(kernel, version, tree)
    names = "\0".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = work / "initramfs.cpio"
    with archive.open("wb") as file:
        subprocess.run(
            ["cpio", "--create", "--null", "--quiet", "--format=newc"],
            cwd=tree,
            input=names.encode(),
            stdout=file,
            check=True,
        )
    return archive


@contextmanager
def started(command: list[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program of the guest; ended with the block."""
    with log.open("wb") as file:
        program = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield program
    finally:
        program.terminate()
        program.wait()


def share(stack: ExitStack, work: Path, tag: str, source: Path, cache: str) -> list[str]:
    """Show a directory to the guest; the options of qemu for it."""
    socket = work / f"{tag}.socket"
    program = next(filter(os.path.exists, VIRTIOFSD))
    options = f"source={source},cache={cache},sandbox=chroot"
    log = work / f"virtiofsd-{tag}.log"
    stack.enter_context(started([program, f"--socket-path={socket}", "-o", options], log))
    deadline = time.monotonic() + _WAIT_S
    while not socket.exists():
        if time.monotonic() > deadline:
            raise SystemExit(log.read_text())
        time.sleep(0.01)
    return [
        *("-chardev", f"socket,id={tag},path={socket}"),
        *("-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=512"),
    ]


def run(kernel: Path, command: list[str]) -> int:
    """Run `command` in a guest with `kernel`; its exit code."""
    image = next((kernel / "boot").glob("vmlinuz-*"))
    version = image.name.removeprefix("vmlinuz-")
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pipeline-guest-")))
        (work / "guest").mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": "/root",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIPELINE_TEST_SLOW": "10",
        }
        (work / "guest/start").write_text(
            START.format(
                huge_pages=HUGE_PAGES,
                modules=shlex.quote(str(kernel / "lib/modules")),
                directory=shlex.quote(os.getcwd()),
                environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
                command=shlex.join(command),
            )
        )
        qemu: list[str | Path] = [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", SIZE),
            *("-nographic", "-no-reboot", "-device", "virtio-rng-pci"),
            *(
                "-object",
                f"memory-backend-memfd,id=memory,size={SIZE},share=on",
                "-numa",
                "node,memdev=memory",
            ),
            *share(stack, work, "root", Path("/"), "always"),
            *share(stack, work, "guest", work / "guest", "none"),
            *("-kernel", image, "-initrd", make_initramfs(kernel, version, work)),
            *("-append", "console=ttyS0 panic=-1 quiet"),
        ]
        output = work / "guest/output"
        output.touch()
        with started(qemu, work / "console") as machine, output.open("rb") as said:
            while machine.poll() is None:
                show(said.read())
                time.sleep(0.2)
            show(said.read())
        code = work / "guest/code"
        if not code.exists():
            print((work / "console").read_text(errors="replace")[-4000:], file=sys.stderr)
            return 125
        return int(code.read_text())


def show(text: bytes) -> None:
    """Print what the command has printed."""
    if text:
        sys.stdout.buffer.write(text)
        sys.stdout.flush()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.guest", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kernel", type=Path, required=True, help="where the package of a kernel was unpacked"
    )
    parser.add_argument("command", nargs="+", help="to be run, in this directory")
    arguments = parser.parse_args()
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        parser.error("root only: its files are shown to the guest by virtiofsd")
    missing = [name for name in TOOLS if shutil.which(name) is None]
    missing += [] if any(map(os.path.exists, VIRTIOFSD)) else ["virtiofsd"]
    if missing:
        parser.error(f"not installed: {', '.join(missing)}")
    return run(arguments.kernel.absolute(), arguments.command)


if __name__ == "__main__":
    sys.exit(main())
