# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory comes and goes while the guest runs: the back end serves what lies in it."""

import time
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MakePlan, write_random
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

SIZE = 512 << 20


@pytest.mark.parametrize("series", images.KERNEL_SERIES)
def test_memory_comes_and_goes(
    series: str, plan_for: MakePlan, root_template: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    digest = write_random(disk, 256 << 20)
    plan = plan_for(
        series,
        root=root_template,
        disks=[disk],
        memory="512M",
        append="oops=panic memhp_default_state=online_movable",
        extra=("-m", "slots=2,maxmem=2G"),
    )
    with Machine(plan) as machine:
        machine.wait_ready()
        monitor = machine.monitor
        before = int(machine.check("awk '/MemTotal/ {print $2}' /proc/meminfo"))
        backend = {"qom-type": "memory-backend-memfd", "id": "more", "size": SIZE, "share": True}
        monitor.command("object-add", **backend)
        monitor.command("device_add", driver="pc-dimm", id="dimm", memdev="more")
        machine.check(
            "modprobe acpi_memhotplug 2>/dev/null; for i in $(seq 100); do "
            f"[ $(awk '/MemTotal/ {{print $2}}' /proc/meminfo) -gt {before + SIZE // 2048} ] "
            "&& exit; sleep 0.1; done; cat /proc/iomem >&2; exit 1"
        )
        # More than there was without it, in the page cache at once: reads end up in the new part.
        machine.check("mkdir -p /mnt/m; mount -t tmpfs -o size=600m none /mnt/m")
        copied = machine.check(f"{DISK_SCRIPT} cat $(disk 1) | tee /mnt/m/a >/mnt/m/b; "
                               "sha256sum </mnt/m/a; sha256sum </mnt/m/b; "
                               f"sha256sum <$(disk 1)")  # fmt: skip
        assert [line.split()[0] for line in copied.splitlines()] == [digest] * 3
        machine.check("umount /mnt/m; echo 3 >/proc/sys/vm/drop_caches")
        monitor.command("device_del", id="dimm")
        deadline = time.monotonic() + 60
        while monitor.count("DEVICE_DELETED") == 0:
            assert time.monotonic() < deadline, machine.check("dmesg | tail -20")
            time.sleep(0.1)
        monitor.command("object-del", id="more")
        found = machine.check(f"{DISK_SCRIPT} sha256sum <$(disk 1)").split()[0]
        assert found == digest
        machine.poweroff()
