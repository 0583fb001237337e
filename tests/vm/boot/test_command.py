# SPDX-License-Identifier: GPL-2.0-or-later
"""What a user meets: exit statuses, clean output, clear failures, and nothing left behind."""

import contextlib
import hashlib
import os
import pty
import re
import resource
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MEBIBYTE
from tests.support.paths import EXAMPLES, PROGRAMS
from vhostvmbus.vm import images
from vhostvmbus.vm.cache import cache_root
from vhostvmbus.vm.process import left_over

VM = (sys.executable, "-m", "vhostvmbus", "vm")
SERVE = (sys.executable, "-m", "vhostvmbus", "serve")


MARK = "VHOSTVMBUS_TEST_MARK"


def marked_processes(mark: str) -> list[str]:
    """Command lines of processes that have *mark* in their environment, this one apart."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    line = (folder / "cmdline").read_bytes()
                    found.append(line.replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return found


def wait_until_none(find: Callable[[], Sequence[object]], patience: float = 20.0) -> None:
    deadline = time.monotonic() + patience
    while (found := find()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert found == []


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, no folder of a run, no temporary file, whatever the test did."""
    mark = uuid.uuid4().hex
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv("TMPDIR", str(temporary))
    yield
    wait_until_none(lambda: marked_processes(mark))
    # Beside this test another one may just be beginning or ending a run of its own.
    wait_until_none(lambda: left_over(cache_root() / "runs"))
    assert list(temporary.iterdir()) == []


def vm(
    *words: str | Path, qemu: Path, timeout: float = 300
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [*VM, "--qemu", qemu, *words],
        capture_output=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def test_a_commands_output_and_status(qemu: Path) -> None:
    script = "seq 20000; seq 20000 30000 >&2; head -c 300000 /dev/zero | tr '\\0' '\\377'; exit 7"
    done = vm("--cmd", script, qemu=qemu)
    assert done.returncode == 7, done.stderr
    numbers = "".join(f"{n}\n" for n in range(1, 20001)).encode()
    assert done.stdout == numbers + b"\xff" * 300000
    errors = "".join(f"{n}\n" for n in range(20000, 30001)).encode()
    assert errors in done.stderr


def test_make_passes_success_and_failure_on(qemu: Path) -> None:
    make = ["make", "-s", "run-vm", f"QEMU={qemu}"]
    tree = images.TREE
    good = subprocess.run(
        [*make, 'CMD=n=5; echo $n "$(printf \'%s\' "a  b")"'], cwd=tree, capture_output=True
    )
    assert (good.returncode, good.stdout) == (0, b"5 a  b\n"), good.stderr
    bad = subprocess.run([*make, "CMD=false"], cwd=tree, capture_output=True)
    assert bad.returncode != 0
    assert bad.stdout == b""


def test_a_panic_is_a_failure_with_its_last_lines(qemu: Path) -> None:
    done = vm("--no-root", "--cmd", "echo c >/proc/sysrq-trigger", qemu=qemu)
    assert done.returncode == 125
    assert b"the guest died: Kernel panic - not syncing: sysrq triggered crash" in done.stderr
    assert b"last console lines" in done.stderr


def test_a_hang_is_a_failure(qemu: Path) -> None:
    done = vm("--no-root", "--cmd", "sleep 1000", "--timeout", "60", qemu=qemu)
    assert done.returncode == 124
    assert b"did not finish the command in time" in done.stderr


def test_a_guest_that_never_boots_is_a_failure(qemu: Path) -> None:
    done = vm("--cmd", "true", "--append", "init=/no/such/program", qemu=qemu)
    assert done.returncode == 125
    assert b"vhostvmbus: fatal: no /no/such/program" in done.stderr


def test_a_guest_that_powers_off_before_the_end_is_a_failure(qemu: Path) -> None:
    done = vm("--cmd", "poweroff; sleep 100", qemu=qemu)
    assert done.returncode == 125
    assert b"powered off before it was asked to" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kernel", "5.9"], b"neither one of 5.10, 6.1, 6.12 nor the path of a vmlinuz"),
        (["--kernel", "/etc/hostname"], b"name its lib/modules/<version> folder"),
        (["--disk", "/no/such/disk.raw"], b"/no/such/disk.raw"),
        (["--device", "/no/such.py:Thing"], b"/no/such.py: no such file"),
        (["--root", "/no/root.img"], b"/no/root.img"),
    ],
)
def test_a_mistake_gets_a_clear_message(words: Sequence[str], message: bytes, qemu: Path) -> None:
    done = vm("--cmd", "true", *words, qemu=qemu)
    assert done.returncode == 125
    assert message in done.stderr
    assert b"Traceback" not in done.stderr


def test_output_that_is_lost_is_a_failure(qemu: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*VM, "--qemu", qemu, "--no-root", "--net", "none", "--cmd", "echo lost"],
            stdout=full,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            timeout=300,
        )
    assert done.returncode == 125
    assert b"the command's stdout could not be written: No space left on device" in done.stderr


def test_a_disk_that_is_too_full_for_an_image_is_said_in_words(qemu: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
    done = subprocess.run(
        [*VM, "--qemu", qemu, "--cmd", "true"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
        preexec_fn=limit,
    )
    assert done.returncode == 125
    assert re.search(rb"vhostvmbus vm: .*\.(img|cpio).*: File too large\n$", done.stderr)
    assert b"Traceback" not in done.stderr


def test_a_qemu_without_our_device_gets_a_clear_message() -> None:
    done = vm("--cmd", "true", qemu=Path("/bin/false"))
    assert done.returncode == 125
    assert b"QEMU did not start" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_second_user_of_an_image_is_told(qemu: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(MEBIBYTE))
    first = subprocess.Popen(
        [*SERVE, "scsi", disk, "--socket", tmp_path / "a.sock"], stderr=subprocess.PIPE
    )
    try:
        assert first.stderr is not None
        assert b"listening" in first.stderr.readline()
        done = vm("--cmd", "true", "--disk", disk, qemu=qemu)
        assert done.returncode == 125
        assert str(disk).encode() in done.stderr
        assert b"in use" in done.stderr or b"lock" in done.stderr
        assert b"Traceback" not in done.stderr
    finally:
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=10)
    assert not (tmp_path / "a.sock").exists()


def test_disks_are_made_and_kept(qemu: Path, tmp_path: Path) -> None:
    disk = tmp_path / "new.raw"
    done = vm(
        "--disk", f"{disk}:32M", "--cmd",
        # Linux names disks in the order in which they answer, so by LUN:
        DISK_SCRIPT + "dd if=/usr/bin/perl of=$(disk 1) bs=1M conv=fsync 2>/dev/null; "
        "sha256sum </usr/bin/perl; stat -L -c %s /usr/bin/perl",
        qemu=qemu,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    digest, _, length = done.stdout.decode().split()
    assert disk.stat().st_size == 32 * MEBIBYTE
    assert hashlib.sha256(disk.read_bytes()[: int(length)]).hexdigest() == digest


def test_every_module_of_the_kernel_can_be_loaded(qemu: Path) -> None:
    modules = "dm-mod overlay bridge veth macvlan nf_tables nfs btrfs sch_netem vmbus_user"
    done = vm("--kernel", "6.12", "--cmd", f"modprobe -a {modules} && lsmod", qemu=qemu)
    assert done.returncode == 0, done.stderr
    loaded = {line.split()[0] for line in done.stdout.decode().splitlines()}
    assert {name.replace("-", "_") for name in modules.split()} <= loaded


def test_devices_of_the_users_own_are_offered_and_heard(qemu: Path) -> None:
    """Several at once, each with its class id; what one writes is on stderr, and in a file."""
    names = [
        f"{EXAMPLES}/echo.py:Echo",
        f"{EXAMPLES}/pfn_digest.py:PfnDigest",
        f"{PROGRAMS}/talkative.py:Talkative",
    ]
    words = [word for name in names for word in ("--device", name)]
    talk = "vmbus-user send -b -d 7f2c9a54-2f0f-4b7e-9a0f-0d6a3a7d9c11 -m"
    script = (
        f"cat /sys/bus/vmbus/devices/*/class_id; {talk} print >/dev/null; {talk} log >/dev/null"
    )
    done = vm("--no-root", *words, "--cmd", script, qemu=qemu)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.decode().split()) >= {
        "{6c0cb9a5-5b1b-4c0f-9d0b-6fb8d2a0e4c1}",
        "{2d5bc5a2-4a86-4d0a-8b6f-3a0c9f1f6e57}",
        "{7f2c9a54-2f0f-4b7e-9a0f-0d6a3a7d9c11}",
    }
    said = done.stderr.decode()
    begin = said.index("Talkative: the file is read\n")
    assert begin < said.index("the guest is up") < said.index("Talkative: printed in two words\n")
    assert re.search(r"^Talkative: .* WARNING talkative: logged$", said, re.MULTILINE)
    (kept,) = re.findall(r"^what (\S+) wrote is in (.*)$", said, re.MULTILINE)
    assert kept[0] == "Talkative"
    assert Path(kept[1]).parent == cache_root() / "logs"
    heard = re.findall(r"^Talkative: (.*\n)", said, re.MULTILINE)
    assert Path(kept[1]).read_text() == "".join(heard)
    Path(kept[1]).unlink()


def test_the_root_template_is_never_written(qemu: Path, root_template: Path) -> None:
    before = hashlib.sha256(root_template.read_bytes()[: 64 * MEBIBYTE]).digest()
    stamp = root_template.stat().st_mtime_ns
    done = vm("--cmd", "echo spoilt >/etc/hostname; rm -rf /usr/share/doc; sync", qemu=qemu)
    assert done.returncode == 0, done.stderr
    assert root_template.stat().st_mtime_ns == stamp
    assert hashlib.sha256(root_template.read_bytes()[: 64 * MEBIBYTE]).digest() == before


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "booting"),
        (signal.SIGTERM, "booting"),
        (signal.SIGHUP, "booting"),
        (signal.SIGKILL, "booting"),
        (signal.SIGINT, "running"),
        (signal.SIGKILL, "running"),
    ],
)
def test_nothing_survives_a_signal(number: signal.Signals, moment: str, qemu: Path) -> None:
    """While it boots and while a command runs. The folder of a killed run goes with the next."""
    child = subprocess.Popen(
        [*VM, "--qemu", qemu, "--cmd", "echo running; sleep 1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # what is read below is one line, and not what comes with it
    )
    assert child.stdout is not None
    assert child.stderr is not None
    if moment == "booting":
        while b"booting" not in (line := child.stderr.readline()):
            assert line
    else:
        assert child.stdout.readline() == b"running\n"
    child.send_signal(number)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode != 0
    assert b"Traceback" not in stderr
    if number == signal.SIGKILL:
        assert vm("--no-root", "--cmd", "true", qemu=qemu).returncode == 0


class Terminal:
    """A user at a terminal."""

    def __init__(self, *words: str | Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(words[0], [str(word) for word in words])
        self.seen = b""

    def wait_for(self, text: bytes, timeout: float = 120) -> None:
        """Read until *text* appears after what was waited for before."""
        deadline = time.monotonic() + timeout
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen[-2000:]
            if select.select([self.fd], [], [], 0.5)[0]:
                try:
                    data = os.read(self.fd, 4096)
                except OSError:
                    data = b""
                assert data, self.seen[-2000:]
                self.seen += data
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self, timeout: float = 60) -> int:
        """Wait for the program's end; its exit status."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.fd, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"still running: {self.seen[-2000:]!r}")


def test_a_shell_at_the_console(qemu: Path) -> None:
    user = Terminal(*VM, "--qemu", qemu)
    user.wait_for(b"Ctrl-A x ends the machine")
    user.wait_for(b"# ")
    user.type(b"echo it is $((6 * 7)); id -un\r")
    user.wait_for(b"it is 42")
    user.wait_for(b"root")
    user.type(b"sh -c 'echo for $((500 + 500)); exec sleep 1000'\r")
    user.wait_for(b"for 1000")
    user.type(b"\x03")  # for the guest's sleep, not for us
    user.wait_for(b"^C")
    user.type(b"echo after $((1 + 1))\r")
    user.wait_for(b"after 2")
    user.type(b"exit\r")
    assert user.end() == 0


def test_the_way_out_of_the_console(qemu: Path) -> None:
    user = Terminal(*VM, "--qemu", qemu)
    user.wait_for(b"# ")
    user.type(b"\x01x")
    assert user.end() == 0


def test_a_shell_fed_by_a_pipe(qemu: Path) -> None:
    done = subprocess.run(
        [*VM, "--qemu", qemu], input=b"echo piped $((2 + 3))\n", capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert b"piped 5" in done.stdout
