# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest without an operating system, that plays by no rules: building it, running it, its report.

``tests/vm/bare_metal/machine`` has its machine and its end of VMBus. A test's own C files have what
the guest does, one scenario per run of QEMU. It reports what it sees as lines ``name=hexadecimal``.
"""

import os
import subprocess
from pathlib import Path

from tests.support.paths import TREE
from vhostvmbus.vm.images import firmware_folders

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


def report_of(command: list[str], timeout: float = 60) -> Report:
    """Returns what the guest reports in a run. QEMU and guest must both come to a regular end."""
    done = run_qemu(command, timeout)
    lines = done.stdout.split()
    assert (done.returncode, lines[-1:]) == (FINISHED, ["END"]), f"{done.stdout}\n{done.stderr}"
    pairs = (line.partition("=") for line in lines[:-1])
    return [(name, int(value, 16)) for name, _, value in pairs]
