# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions of guest memory as a front end describes them: docs/vhost-user-vmbus.md, *Guest memory*.

The rules here hold for the table that a session keeps and for the map that is made from it.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

MAX_REGIONS = 100
"""Regions of guest RAM that a front end may have: the answer to ``GET_MAX_MEM_SLOTS``. Each is one
of the code map, too, and one ``VMBUS_SET_CODE_MAP`` holds that many (docs/vhost-user-vmbus.md)."""


class SharedRegion(NamedTuple):
    """``size`` bytes of guest RAM at ``guest_phys_addr``: those of ``fd`` at ``mmap_offset``."""

    guest_phys_addr: int
    size: int
    fd: int
    mmap_offset: int = 0


class Addresses(Protocol):
    """A stretch of guest-physical addresses."""

    @property
    def guest_phys_addr(self) -> int:
        """The first byte."""

    @property
    def size(self) -> int:
        """The number of bytes."""


A = TypeVar("A", bound=Addresses)


def overlap_among(regions: Iterable[A]) -> tuple[A, A] | None:
    """Returns two of ``regions`` that share an address, or ``None``."""
    ordered = sorted(regions, key=lambda region: region.guest_phys_addr)
    for below, above in pairwise(ordered):
        if below.guest_phys_addr + below.size > above.guest_phys_addr:
            return below, above
    return None
