# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest to measure in."""

from __future__ import annotations

from vhostvmbus.vm import images
from vhostvmbus.vm.accel import choose
from vhostvmbus.vm.machine import MachinePlan


def plain_guest(series: str) -> MachinePlan:
    """Returns the plan of a guest with a kernel of ``series`` and a root disk, and nothing else.

    Builds and fetches what is missing, so call it where the network can be reached.
    """
    kernel = images.find_kernel(series)
    return MachinePlan(
        qemu=images.qemu_binary(),
        kernel=kernel.image,
        initramfs=images.find_initramfs(kernel),
        accel=choose("auto").name,
        root=images.root_template(),
    )
