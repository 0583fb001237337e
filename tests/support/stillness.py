# SPDX-License-Identifier: GPL-2.0-or-later
"""Stops a software guest's machine, and looks whether anything of it changes meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.vhost_user import messages as m

LOOKED_AT = b"\x5a\xa5\x5a\xa5"
"""Stands in the mask of every out ring while the machine is stopped, so that a back end is seen
as well that masks a ring which it has masked already.
"""
_MASK_OFFSET = 8


def stop(guest: SoftwareGuest) -> None:
    """Stops the machine. Raises :class:`RequestRefused` if the device does not stand still."""
    guest.front_end.request(m.Suspend())


def cont(guest: SoftwareGuest) -> None:
    """Lets the machine go on."""
    guest.front_end.request(m.Continue())


def memory_of(guest: SoftwareGuest) -> list[bytes]:
    """Returns all of the guest's memory, region by region."""
    return [os.pread(region.fd, region.size, region.mmap_offset) for region in guest.ram.regions]


@contextmanager
def unchanged(guest: SoftwareGuest) -> Iterator[None]:
    """Fails if the guest's memory changes in the ``with`` block, by whatever is written."""
    before = {}
    for gpadl in guest.gpadls.values():
        pfn = gpadl.ranges[0].pfns[0]
        before[pfn] = guest.ram.read([pfn], 4, _MASK_OFFSET)
        guest.ram.write([pfn], LOOKED_AT, _MASK_OFFSET)
    memory = memory_of(guest)
    yield
    assert memory_of(guest) == memory
    for pfn, mask in before.items():
        guest.ram.write([pfn], mask, _MASK_OFFSET)
