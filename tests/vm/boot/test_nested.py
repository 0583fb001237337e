# SPDX-License-Identifier: GPL-2.0-or-later
"""Real KVM, without hardware for it: the way most users' machines go."""

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.support.machines import write_random
from tests.support.paths import EXAMPLES

SCRIPT = """\
set -e
grep -q 'hypervisor' /proc/cpuinfo
dmesg | grep -o 'Hypervisor detected: .*'
findmnt -n -o SOURCE /
for entry in /sys/bus/scsi/devices/*:1/block/*; do disk=/dev/${entry##*/}; done
sha256sum <$disk
head -c 1048576 /dev/urandom >/tmp/new
dd if=/tmp/new of=$disk bs=64k seek=16 conv=notrunc,fsync status=none
sha256sum </tmp/new
uname -r
# The guest module, with external PFNs: what the device read is what is in the pages.
vmbus-user send -d 2d5bc5a2-4a86-4d0a-8b6f-3a0c9f1f6e57 -p /usr/bin/ls -c 20 | sort -u
sha256sum </usr/bin/ls
echo nested-marker-end
"""


def test_the_same_smoke_test_under_kvm(qemu: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    digest = write_random(disk, 8 << 20)
    done = subprocess.run(
        [sys.executable, "-m", "vhostvmbus", "vm", "--accel", "nested", "--disk", disk,
         "--device", f"{EXAMPLES / 'pfn_digest.py'}:PfnDigest", "--qemu", qemu,
         "--timeout", "300", "--kernel", "6.12", "--cmd", SCRIPT],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Hypervisor detected: Microsoft Hyper-V"
    assert lines[1].startswith("/dev/sd")
    assert lines[2].split()[0] == digest
    with open(disk, "rb") as file:
        file.seek(1 << 20)
        assert hashlib.sha256(file.read(1 << 20)).hexdigest() == lines[3].split()[0]
    assert lines[4].startswith("6.12.")
    assert lines[5] == lines[6].split()[0]
    assert len(lines[5]) == 64
    assert lines[7] == "nested-marker-end"
    # Said by the machine in the machine: it did not fall back to translation.
    assert "accelerator: kvm" in done.stderr
