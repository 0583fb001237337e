# SPDX-License-Identifier: GPL-2.0-or-later
"""What ``serve`` gives up once all is open, seen from outside and from within."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.waiting import eventually
from tests.unit.cli.test_serve import SERVE, serving
from vhostvmbus.cli.sandbox import CAPABILITIES
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.guest.netvsc import Netvsc
from vhostvmbus.observe.statistics import read_statistics


def rights(process: int, thread: int | None = None) -> tuple[int, int, int, int]:
    """No new privileges, the kind of seccomp, effective and bounding capabilities of a thread."""
    lines = Path(f"/proc/{process}/task/{thread or process}/status").read_text().splitlines()
    found = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    flags = int(found["NoNewPrivs"]), int(found["Seccomp"])
    return *flags, int(found["CapEff"], 16), int(found["CapBnd"], 16)


def test_what_a_disk_has_left(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    command = [*SERVE, "scsi", f"{tmp_path / 'new.raw'}:1M", "--socket", str(path)]
    with serving(command, path, stderr=subprocess.DEVNULL) as process:
        with SoftwareGuest.connect(path):
            pass  # served, and so after all that comes before
        found = read_statistics(path)["sandbox"]
        no_new, seccomp, effective, bounding = rights(process.pid)
        assert found["no_new_privs"] is True
        assert found["refused_system_calls"] > 40
        assert found["capabilities"] == ["DAC_OVERRIDE"]
        kept = 1 << CAPABILITIES["DAC_OVERRIDE"]
        assert (no_new, seccomp, effective, bounding) == (1, 2, kept, kept)
        for thread in Path(f"/proc/{process.pid}/task").iterdir():  # the filter is everybody's
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                assert rights(process.pid, int(thread.name))[:2] == (1, 2)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def test_a_card_still_changes_its_tap_makes_it_again_and_removes_its_namespace(
    tmp_path: Path,
) -> None:
    path, name = tmp_path / "a.sock", f"sandbox-{os.getpid()}"
    command = [*SERVE, "net", "--link", f"netns:{name}", "--socket", str(path)]
    with serving(command, path, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: rights(process.pid)[:2] == (1, 2))
        before = ip("-n", name, "-o", "link", "show", "vmbus0").split(":")[0]
        ip("-n", name, "link", "del", "vmbus0")
        eventually(lambda: "vmbus0" in ip("-n", name, "-o", "link"))
        assert ip("-n", name, "-o", "link", "show", "vmbus0").split(":")[0] != before
        with SoftwareGuest.connect(path) as guest:  # on a thread that began later
            Netvsc(guest, guest.enable()).initialize(mtu=4000)
            assert "mtu 4000" in ip("-n", name, "link", "show", "vmbus0")
    assert name not in ip("netns", "list")


def test_a_card_still_starts_passt_anew_and_ends_one_that_hangs(tmp_path: Path) -> None:
    path, log = tmp_path / "a.sock", tmp_path / "log"
    command = [*SERVE, "net", "--link", "user", "--socket", str(path)]

    def children() -> list[str]:
        tasks = Path(f"/proc/{process.pid}/task").iterdir()
        return " ".join((task / "children").read_text() for task in tasks).split()

    with open(log, "wb") as file, serving(command, path, stderr=file) as process:
        eventually(lambda: rights(process.pid)[:2] == (1, 2))
        for child in children():
            os.kill(int(child), signal.SIGKILL)
        eventually(lambda: "passt runs" in log.read_text())  # and has shut itself in
        last = children()
        for child in last:
            os.kill(int(child), signal.SIGSTOP)
    assert last
    assert not [child for child in last if Path(f"/proc/{child}").exists()]


PROGRAM = """
import ctypes, json, os, socket, sys, threading
from vhostvmbus.cli import sandbox
libc = ctypes.CDLL(None, use_errno=True)
def attempts():
    outcome = {}
    for name, arguments in (("unshare", (0x400,)), ("ptrace", (0x4200, 1, 0, 0)),
                            ("umount2", (b"/x", 0)), ("chroot", (b"/",)), ("personality", (0,))):
        ctypes.set_errno(0)
        outcome[name] = (getattr(libc, name)(*arguments), ctypes.get_errno())
    try:
        os.execv("/bin/true", ["true"])
    except OSError as error:
        outcome["execve"] = error.errno
    return outcome
go, outcome = threading.Event(), []
earlier = threading.Thread(target=lambda: (go.wait(), outcome.append(attempts())))
earlier.start()
sandbox.enter((), sys.argv[1:])
go.set()
earlier.join()
outcome.append(attempts())
print(json.dumps(outcome))
"""


def test_system_calls_are_refused_in_each_thread_but_those_that_are_asked_for() -> None:
    words = [sys.executable, "-c", PROGRAM, "umount2"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found in json.loads(done.stdout):
        for name in ("unshare", "ptrace", "chroot", "personality"):
            assert found[name] == [-1, 1], name
        assert found["umount2"] == [-1, 2]  # there is no such mount
        assert found["execve"] == 1


def test_without_libseccomp() -> None:
    """No system call is refused, and what is given up is said."""
    program = """
import ctypes, json
from vhostvmbus.cli import sandbox
real = ctypes.CDLL
def missing(name, **options):
    return real("a library that is missing" if name == "libseccomp.so.2" else name, **options)
ctypes.CDLL = missing
print(json.dumps([sandbox.enter(), open("/proc/self/status").read()]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, status = json.loads(done.stdout)
    kept = ["DAC_OVERRIDE"] if os.geteuid() == 0 else []
    assert found == {"no_new_privs": True, "capabilities": kept, "refused_system_calls": 0}
    assert "NoNewPrivs:\t1\nSeccomp:\t0\n" in status
