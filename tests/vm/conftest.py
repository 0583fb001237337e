# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines for the tests. Nothing is skipped: what is missing is built, or the test fails.

With several test processes (pytest-xdist, ``--dist loadgroup``) one of them runs all machines: they
are measured against time limits, and share guests.

``VHOSTVMBUS_QEMU`` names another QEMU; ``VHOSTVMBUS_SOAK=1`` makes the repeating tests repeat
more often.
"""

from collections.abc import Iterator
from dataclasses import replace
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
from tests.support.net_rig import HOST4, HOST6, MAC, QUEUES, Rig
from tests.support.network import namespace_name, require_root
from tests.support.soak import SOAK
from vhostvmbus.vm import images
from vhostvmbus.vm.accel import choose
from vhostvmbus.vm.machine import Machine, MachinePlan

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.xdist_group("machines"))
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(3600 if SOAK else 900))


@pytest.fixture(scope="session", autouse=True)
def the_only_process(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> None:
    """Machines in two processes would be in each other's way, and share no guests."""
    claim = tmp_path_factory.getbasetemp().parent / "machines"
    if worker_id != "master":
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            pytest.fail("two processes run machines: pytest-xdist did not take the tests' group")


@pytest.fixture(scope="session")
def qemu() -> Path:
    """QEMU with our device, built if there is none."""
    return images.qemu_binary()


@pytest.fixture(scope="session")
def plan_for(qemu: Path) -> MakePlan:
    """Makes a plan for the kernel of a series; keywords as in MachinePlan."""

    def make(series: str = "6.1", **keywords: object) -> MachinePlan:
        kernel = images.find_kernel(series)
        plan = MachinePlan(
            qemu=qemu,
            kernel=kernel.image,
            initramfs=images.find_initramfs(kernel),
            accel=choose("auto").name,
            append="oops=panic",
        )
        return replace(plan, **keywords)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def root_template() -> Path:
    """The root file system's image."""
    return images.root_template()


@pytest.fixture(scope="session", params=images.KERNEL_SERIES)
def guest(
    request: pytest.FixtureRequest,
    plan_for: MakePlan,
    root_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Guest]:
    """A guest that tests share, one for each kernel. A test leaves it as it found it."""
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


@pytest.fixture(scope="session", params=images.KERNEL_SERIES)
def rig(request: pytest.FixtureRequest, plan_for: MakePlan, root_template: Path) -> Iterator[Rig]:
    """A guest with a network card that tests share, one for each kernel."""
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
