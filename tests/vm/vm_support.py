# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests with virtual machines share, besides fixtures."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vhostvmbus.vm.machine import Machine, Plan

SOAK = os.environ.get("VHOSTVMBUS_SOAK") == "1"
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

MakePlan = Callable[..., Plan]


def write_random(path: Path, size: int) -> str:
    """Fill a file with random bytes; their SHA-256."""
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
        """Run a script that has to succeed; it may use ``disk LUN``."""
        return self.machine.check(DISK_SCRIPT + script, timeout)
