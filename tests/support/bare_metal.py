# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest without an operating system, that plays by no rules: building it, running it, its report.

``tests/vm/bare_metal/machine`` has its machine and its end of VMBus. A test's own C files have what
the guest does, one scenario per run of QEMU. It reports what it sees as lines ``name=hexadecimal``.
"""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests.support.paths import TREE
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.errors import VmError
from vhostvmbus.vm.images import firmware_folders
from vhostvmbus.vm.qmp import Monitor

MACHINE = TREE / "tests" / "vm" / "bare_metal" / "machine"
FLAGS = (
    *("-m32", "-march=i686", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror"),
    *("-ffreestanding", "-fno-strict-aliasing", "-fno-pic", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-mgeneral-regs-only"),
    *("-nostdlib", "-static", "-no-pie", f"-I{MACHINE}"),
    "-Wl,-Ttext=0x100000,--build-id=none,-e,start,-n,--no-warn-rwx-segments",
)
DEBUG_EXIT = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
FINISHED = 1
"""The exit status of QEMU when the guest writes 0 to isa-debug-exit."""

Report = list[tuple[str, int]]


def build_guest(scenarios: Path, folder: Path) -> Path:
    """Builds a multiboot kernel in ``folder``, with the C files of the folder ``scenarios``."""
    kernel = folder / "guest"
    compiler = os.environ.get("CC", "gcc").split()
    sources = [MACHINE / "boot.S", *sorted(MACHINE.glob("*.c")), *sorted(scenarios.glob("*.c"))]
    subprocess.run([*compiler, *FLAGS, "-o", kernel, *sources], check=True, timeout=60)
    return kernel


def qemu_command(qemu: Path, *words: str) -> list[str]:
    """Returns QEMU's words for a small machine that is always translated; the serial port is
    stdout.
    """
    command = [str(qemu), "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg"]
    for folder in firmware_folders():
        command += ["-L", str(folder)]
    return [*command, "-machine", "pc", "-m", "128", "-serial", "stdio", *words]


def run_qemu(command: list[str], timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs QEMU to its end."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )


def report_of(command: list[str], timeout: float = 60, *, quiet: bool = False) -> Report:
    """Returns what the guest reports in a run. QEMU and guest must both come to a regular end.

    With ``quiet`` QEMU must have nothing to say, whatever the guest does.
    """
    done = run_qemu(command, timeout)
    assert not (quiet and done.stderr), done.stderr
    lines = done.stdout.split()
    assert (done.returncode, lines[-1:]) == (FINISHED, ["END"]), f"{done.stdout}\n{done.stderr}"
    pairs = (line.partition("=") for line in lines[:-1])
    return [(name, int(value, 16)) for name, _, value in pairs]


def served_by(back_end: BackEndProcess, memory: Path | None = None) -> tuple[str, ...]:
    """Returns QEMU's options for the device of a back end that runs; the device's name comes last.

    The guest's memory is the file ``memory``, if that is given.
    """
    backing = f"memory-backend-file,mem-path={memory}" if memory else "memory-backend-memfd"
    return (
        *("-object", f"{backing},id=mem,size=128M,share=on"),
        *("-machine", "memory-backend=mem"),
        *("-chardev", f"socket,id=c0,path={back_end.socket},reconnect-ms=50"),
        *("-device", "vhost-user-vmbus,chardev=c0,id=dev0"),
    )


def plug(monitor: Monitor, **properties: object) -> None:
    """Plugs the device of the back end in, once that is connected."""
    words = {"driver": "vhost-user-vmbus", "chardev": "c0", "id": "dev0"}
    deadline = time.monotonic() + 30
    while True:
        try:
            monitor.command("device_add", **words, **properties)
            return
        except VmError as error:
            if "no back end" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def converse(
    command: list[str], act: Callable[[Monitor, int], None], stderr: IO[str] | None = None
) -> Report:
    """Returns what the guest reports in a run in which it asks the host for something at times.

    A line ``host=N`` is such a request: ``act`` is called with QEMU's monitor and N, and when it
    returns the guest is told by a byte. QEMU and guest must both come to a regular end.
    """
    ours, theirs = socket.socketpair()
    words = [
        *command,
        "-chardev",
        f"socket,id=qmp,fd={theirs.fileno()}",
        "-mon",
        "qmp,mode=control",
    ]
    report: Report = []
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        bufsize=1,
        pass_fds=(theirs.fileno(),),
    ) as child:
        theirs.close()
        assert child.stdin is not None
        assert child.stdout is not None
        monitor = Monitor(ours)
        try:
            for line in child.stdout:
                name, _, value = line.strip().partition("=")
                if name == "END":
                    break
                if name == "host":
                    act(monitor, int(value, 16))
                    child.stdin.write("x")
                    child.stdin.flush()
                else:
                    report.append((name, int(value, 16)))
            assert child.wait(30) == FINISHED, report
        finally:
            child.kill()
            monitor.close()
    return report
