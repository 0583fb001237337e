# SPDX-License-Identifier: GPL-2.0-or-later
"""Machines for the tests. Nothing is skipped: what is missing is built, or the test fails.

With several test processes (pytest-xdist, ``--dist loadgroup``) one of them runs all tests of a
kernel, which share guests, and one all tests of a module that are for no kernel in particular.

``VHOSTVMBUS_QEMU`` names another QEMU; ``VHOSTVMBUS_SOAK=1`` makes the repeating tests repeat
more often.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.machines import MakePlan
from tests.support.soak import SOAK
from vhostvmbus.vm import images
from vhostvmbus.vm.accel import choose
from vhostvmbus.vm.machine import MachinePlan

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.machines)
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(3600 if SOAK else 900))


def group_of(item: pytest.Item) -> str:
    """Returns the name of the tests that run in the same process as this one."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    for series in images.KERNEL_SERIES:
        if series in parameters:
            return f"kernel-{series}"
    return item.path.stem


@pytest.fixture(autouse=True)
def one_process_for_each_group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> None:
    """Fails if another process has had a test of this one's group: guests would be booted twice."""
    group = request.node.get_closest_marker("xdist_group").args[0]
    claim = tmp_path_factory.getbasetemp().parent / f"machines-{group}"
    if worker_id != "master":
        with contextlib.suppress(FileExistsError):
            claim.symlink_to(worker_id)
        if claim.readlink() != Path(worker_id):
            pytest.fail(f"two processes run {group}: pytest-xdist did not take the tests' group")


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
