# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock guest with two more disks."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines import (
    DATA_SIZE,
    MEBIBYTE,
    SCRATCH_SIZE,
    Guest,
    MakePlan,
    write_random,
)
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine


@pytest.fixture(scope="package", params=images.KERNEL_SERIES)
def guest(
    request: pytest.FixtureRequest,
    plan_for: MakePlan,
    root_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guest]:
    """A guest that the tests of this folder share, one for each kernel; it ends with the last of
    them. A test leaves it as it found it."""
    folder = tmp_path_factory.mktemp(f"guest-{request.param}")
    data, scratch = folder / "data.raw", folder / "scratch.raw"
    digest = write_random(data, DATA_SIZE)
    disks = [data, f"{scratch}:{SCRATCH_SIZE // MEBIBYTE}M"]
    plan = plan_for(request.param, root=root_template, disks=disks)
    with Machine(plan) as machine:
        machine.wait_ready()
        yield Guest(request.param, machine, data, digest, scratch)
        machine.poweroff()
    data.unlink()
    scratch.unlink()
