# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's driver comes and goes; the back end comes and goes."""

from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MEBIBYTE, MakePlan, write_random
from tests.support.soak import times
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

RELOADS = times(5, 300)
RESTARTS = times(2, 20)


@pytest.mark.parametrize("series", images.KERNEL_SERIES)
def test_the_driver_is_unloaded_and_loaded_again(
    series: str, plan_for: MakePlan, tmp_path: Path
) -> None:
    """Each time the channel closes and opens, and the disk has every byte."""
    disk = tmp_path / "disk.raw"
    digest = write_random(disk, 4 * MEBIBYTE)
    with Machine(plan_for(series, disks=[disk])) as machine:
        machine.wait_ready()
        text = machine.check(
            DISK_SCRIPT
            + f"""
            set -e
            for round in $(seq {RELOADS}); do
                rmmod hv_storvsc
                [ ! -e /sys/bus/scsi/devices/*/block ] || exit 3
                modprobe hv_storvsc
                waited=0
                until device=$(disk 0 2>/dev/null); do
                    waited=$((waited + 1))
                    [ $waited -lt 200 ] || exit 4
                    sleep 0.1
                done
                sha256sum <$device
            done
            """,
            30 * RELOADS,
        )
        assert [line.split()[0] for line in text.splitlines()] == [digest] * RELOADS
        machine.poweroff()


def test_the_back_end_is_killed_and_started_again(
    plan_for: MakePlan, root_template: Path, tmp_path: Path
) -> None:
    """The guest idles meanwhile; afterwards it reads and writes as if nothing had been."""
    disk = tmp_path / "disk.raw"
    digest = write_random(disk, 16 * MEBIBYTE)
    with Machine(plan_for(root=root_template, disks=[disk])) as machine:
        machine.wait_ready()
        machine.backends_may_end = True
        (backend,) = machine.backends
        for count in range(RESTARTS):
            machine.check(f"echo {count} >>/root/count; sync; sleep 1")
            backend.kill()
            machine.run("sleep 1", 30)
            backend.start()
            text = machine.check(
                "echo 3 >/proc/sys/vm/drop_caches; cat /root/count | wc -l; "
                + DISK_SCRIPT
                + "sha256sum <$(disk 1)"
            )
            lines, found = text.split()[:2]
            assert (int(lines), found) == (count + 1, digest)
        machine.poweroff()


def test_the_guest_reboots_while_its_back_end_is_away(
    plan_for: MakePlan, root_template: Path
) -> None:
    with Machine(plan_for(root=root_template)) as machine:
        machine.wait_ready()
        machine.check("sync; sleep 1")
        machine.backends_may_end = True
        (backend,) = machine.backends
        backend.kill()
        machine.monitor.command("system_reset")
        backend.start()
        machine.wait_ready(boots=2)
        assert machine.check("findmnt -n -o SOURCE /").startswith("/dev/sd")
        machine.poweroff()
