# SPDX-License-Identifier: GPL-2.0-or-later
"""The support that tests with virtual machines share, besides fixtures."""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.footprint import Subject
from tests.support.paths import PROGRAMS
from tests.support.waiting import eventually
from vhostvmbus.observe.statistics import read_statistics
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.errors import VmError
from vhostvmbus.vm.machine import Machine, MachinePlan

MEBIBYTE = 1 << 20
DATA_SIZE = 256 * MEBIBYTE
SCRATCH_SIZE = 1024 * MEBIBYTE
DATA_LUN = 1
SCRATCH_LUN = 2
DISK_SCRIPT = """\
disk() {
    for entry in /sys/bus/scsi/devices/*:"$1"/block/*; do
        [ -e "$entry" ] && echo "/dev/${entry##*/}" && return
    done
    echo "no disk with LUN $1" >&2
    return 1
}
"""
"""A shell function for the guest: ``disk LUN`` prints the block device."""

MakePlan = Callable[..., MachinePlan]


def compiled(name: str, folder: Path) -> bytes:
    """Returns a program of ``programs/`` in C, for a guest without a C library."""
    path = folder / name
    words = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", path]
    subprocess.run([*words, PROGRAMS / f"{name}.c"], check=True)
    return path.read_bytes()


def write_random(path: Path, size: int) -> str:
    """Fills a file with random bytes. Returns their SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(size // MEBIBYTE):
            block = os.urandom(MEBIBYTE)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Guest:
    """A booted Debian with its root on LUN 0, random data on LUN 1, scratch space on LUN 2."""

    series: str
    machine: Machine
    data: Path
    data_digest: str
    scratch: Path

    def check(self, script: str, timeout: float = 120.0) -> str:
        """Runs a script that has to succeed; it may use ``disk LUN``."""
        return self.machine.check(DISK_SCRIPT + script, timeout)


BACK_END_MEMORY = QEMU_MEMORY = 8
"""MiB by which these may grow, under load."""
POOL = 8
"""The threads that a controller makes when it first has work for them."""


def watched(machine: Machine, backend: BackEndProcess) -> list[Subject]:
    """Returns the two processes that are not to grow, whatever is repeated with a device."""
    return [
        Subject("the back end", lambda: backend.child.pid, BACK_END_MEMORY, POOL),
        Subject("QEMU", lambda: machine.qemu.pid, QEMU_MEMORY),
    ]


def wait_for_channels(backend: BackEndProcess, count: int) -> None:
    """Waits until the guest has ``count`` channels open; it opens some after it uses the first."""
    eventually(lambda: count_channels(backend) == count)


def count_channels(backend: BackEndProcess) -> int:
    """Counts the open channels of the back end."""
    return len(read_statistics(backend.socket)["channels"])


def device_of(machine: Machine, chardev: str) -> str:
    """Returns the QOM path of the vhost-user-vmbus device whose back end is at ``chardev``."""
    for group in ("peripheral", "peripheral-anon"):
        for node in machine.monitor.command("qom-list", path=f"/machine/{group}"):
            path = f"/machine/{group}/{node['name']}"
            if node["type"] == "child<vhost-user-vmbus>" and chardev == machine.monitor.command(
                "qom-get", path=path, property="chardev"
            ):
                return path
    raise AssertionError(f"no device at {chardev}")


def unplug(machine: Machine, chardev: str, patience: float = 60.0) -> None:
    """Does ``device_del``, until QEMU says that the device is gone."""
    monitor = machine.monitor
    before = monitor.count("DEVICE_DELETED")
    path = device_of(machine, chardev)
    monitor.command("device_del", id=path)
    deadline = time.monotonic() + patience
    while monitor.count("DEVICE_DELETED") == before:
        assert time.monotonic() < deadline, f"the guest keeps the device at {chardev}"
        time.sleep(0.02)


def plug(machine: Machine, chardev: str, patience: float = 20.0, **properties: object) -> None:
    """Does ``device_add``, as soon as the back end has connected again."""
    deadline = time.monotonic() + patience
    while True:
        try:
            machine.monitor.command(
                "device_add", driver="vhost-user-vmbus", chardev=chardev, **properties
            )
            return
        except VmError as error:
            if "no back end" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
