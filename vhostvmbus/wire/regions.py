# SPDX-License-Identifier: GPL-2.0-or-later
"""Regions of guest memory as a front end describes them: docs/vhost-user-vmbus.md, *Guest memory*.

The rules here hold for what a front end says, and for what is mapped because of it.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeVar

from vhostvmbus.wire.vmbus import PAGE_SIZE

MAX_REGIONS = 100
"""Regions of guest RAM that a front end may have: the answer to ``GET_MAX_MEM_SLOTS``. Each is one
of the code map, too, and one ``VMBUS_SET_CODE_MAP`` holds that many (docs/vhost-user-vmbus.md)."""

EVERY_PAGE = (1 << 64) - 1
"""As ``first_bit`` of a region of the code map: the front end cannot tell, so every page of the
region counts as translated."""


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


def lies_in_code_map(size: int, first_bit: int, map_bytes: int) -> bool:
    """Tells whether a code map of ``map_bytes`` has bits for all pages of ``size`` bytes."""
    pages = (size + PAGE_SIZE - 1) // PAGE_SIZE
    return first_bit == EVERY_PAGE or first_bit + pages <= map_bytes * 8
