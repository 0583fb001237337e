# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock guest with one card."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines import MakePlan
from tests.support.net_rig import HOST4, HOST6, MAC, QUEUES, Rig
from tests.support.network import namespace_name, require_root
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine


@pytest.fixture(scope="package", params=images.KERNEL_SERIES)
def rig(request: pytest.FixtureRequest, plan_for: MakePlan, root_template: Path) -> Iterator[Rig]:
    """A guest that the tests of this folder share, one for each kernel; it ends with the last of
    them."""
    require_root()
    name = namespace_name()
    link = f"netns:{name},mac={MAC.hex(':')},ip={HOST4}/24,ip={HOST6}/64,queues={QUEUES}"
    plan = plan_for(request.param, root=root_template, networks=[link], smp=QUEUES)
    with Machine(plan) as machine:
        machine.wait_ready()
        rig = Rig(machine, name)
        rig.bring_up()
        yield rig
        machine.poweroff()
