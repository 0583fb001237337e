# SPDX-License-Identifier: GPL-2.0-or-later
"""Stock kernels boot from the disk, reboot, and do so every time. What a guest that has booted is
like, ``tests/vm/disk/test_guest.py`` looks at."""

from pathlib import Path

import pytest

from tests.support.machines import MakePlan
from tests.support.soak import times
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

REBOOTS = times(2, 30)
BOOTS = times(2, 100)


@pytest.mark.parametrize("series", images.KERNEL_SERIES)
def test_reboots_in_one_qemu(series: str, plan_for: MakePlan, root_template: Path) -> None:
    """With bash as /bin/sh from the first reboot on, as other distributions have it."""
    with Machine(plan_for(series, root=root_template)) as machine:
        machine.wait_ready()
        for count in range(1, REBOOTS + 1):
            machine.check(f"ln -sf bash /bin/sh; echo {count} >>/root/boots; sync")
            machine.reboot()
            found = machine.check("readlink /bin/sh; wc -l </root/boots").split()
            assert found == ["bash", str(count)]
        machine.poweroff()


def test_boots_with_four_processors(plan_for: MakePlan, root_template: Path) -> None:
    for number in range(BOOTS):
        series = images.KERNEL_SERIES[number % len(images.KERNEL_SERIES)]
        with Machine(plan_for(series, root=root_template, smp=4)) as machine:
            machine.wait_ready()
            assert machine.check("nproc").strip() == "4"
            machine.poweroff()
