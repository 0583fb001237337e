# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests of real drivers are those that the SCSI controller's plan is for.

Whether they are done right is what all other tests here are about; were they not planned, all of
those would still pass.
"""

import sys
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MakePlan, write_random
from tests.support.paths import PROGRAMS
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

COUNTING = (sys.executable, str(PROGRAMS / "serve_counting.py"))


@pytest.mark.parametrize("series", images.KERNEL_SERIES)
def test_real_drivers_reads_and_writes_are_planned(
    plan_for: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, series: str
) -> None:
    disk, counts = tmp_path / "disk.raw", tmp_path / "counts"
    write_random(disk, 32 << 20)
    before = disk.read_bytes()
    monkeypatch.setenv("COUNTS", str(counts))
    with Machine(plan_for(series, disks=[disk], serve=COUNTING)) as machine:
        machine.wait_ready()
        result = machine.run(
            DISK_SCRIPT + "dd if=$(disk 0) of=/tmp/all bs=64k && "
            "dd if=/tmp/all of=$(disk 0) bs=64k && sync",
            300,
        )
        assert result.status == 0, result
        machine.poweroff()
    assert disk.read_bytes() == before
    lines = [line.split() for line in counts.read_text().splitlines()]
    received, planned = (sum(int(line[i]) for line in lines) for i in (0, 1))
    assert planned > 64
    assert planned > received * 0.6, "the rest: probing, flushes, what the host had to fetch"
