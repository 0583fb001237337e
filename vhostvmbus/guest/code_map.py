# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end's half of "Translated code": the bitmap of pages that hold translated code.

The software guest translates nothing; tests set the bits and see what the back end does.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

from vhostvmbus.guest.ram import RamRegion
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.wire.regions import EVERY_PAGE
from vhostvmbus.wire.vmbus import PAGE_SIZE


class GuestCodeMap:
    """A code map: one bit for each page of ``regions``, in a memfd.

    ``cannot_tell`` declares every region with ``first_bit`` of all ones.
    """

    def __init__(self, regions: Sequence[RamRegion], *, cannot_tell: bool = False) -> None:
        self._first_bits: list[tuple[RamRegion, int]] = []
        bits = 5  # the first region's bits do not begin with a byte
        for region in regions:
            self._first_bits.append((region, bits))
            bits += region.size // PAGE_SIZE
        self.size = (bits + 7) // 8
        self.cannot_tell = cannot_tell
        self.fd = os.memfd_create("code-map", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self._map = mmap.mmap(self.fd, self.size)

    def message(self) -> m.SetCodeMap:
        """Returns ``VMBUS_SET_CODE_MAP`` for this map; :attr:`fd` goes with it."""
        return m.SetCodeMap(
            self.size,
            tuple(
                m.CodeMapRegion(
                    region.guest_phys_addr,
                    region.size,
                    EVERY_PAGE if self.cannot_tell else first,
                )
                for region, first in self._first_bits
            ),
        )

    def mark(self, pfn: int, translated: bool = True) -> None:
        """Sets the bit of a page, or clears it."""
        at, mask = self._locate(pfn)
        if translated:
            self._map[at] |= mask
        else:
            self._map[at] &= ~mask

    def is_marked(self, pfn: int) -> bool:
        """Returns whether the bit of a page is set."""
        at, mask = self._locate(pfn)
        return bool(self._map[at] & mask)

    def take_over(self, older: GuestCodeMap) -> None:
        """Sets the bits of every page that ``older`` has set and this map has as well."""
        for region, _ in self._first_bits:
            if any(region == known for known, _ in older._first_bits):
                page = region.guest_phys_addr // PAGE_SIZE
                for pfn in range(page, page + region.size // PAGE_SIZE):
                    if older.is_marked(pfn):
                        self.mark(pfn)

    def close(self) -> None:
        """Unmaps the map and closes its file."""
        self._map.close()
        os.close(self.fd)

    def _locate(self, pfn: int) -> tuple[int, int]:
        address = pfn * PAGE_SIZE
        for region, first in self._first_bits:
            if region.guest_phys_addr <= address < region.guest_phys_addr + region.size:
                bit = first + (address - region.guest_phys_addr) // PAGE_SIZE
                return bit // 8, 1 << bit % 8
        raise ValueError(f"page {pfn:#x} is in no region of the code map")
