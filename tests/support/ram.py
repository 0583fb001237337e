# SPDX-License-Identifier: GPL-2.0-or-later
"""A piece of guest RAM for tests that have no guest, and page numbers in it."""

import os

from vhostvmbus.memory import GuestMemory
from vhostvmbus.wire.vmbus import PAGE_SIZE

BASE = 0x100000
BASE_PFN = BASE // PAGE_SIZE
PAGES = 512


class Ram:
    """A memfd with guest RAM at :data:`BASE`, mapped once for looking into it."""

    def __init__(self, pages: int = PAGES, base: int = BASE) -> None:
        self.base = base
        self.size = pages * PAGE_SIZE
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)

    def memory(self) -> GuestMemory:
        """Returns a memory map with this RAM in it."""
        memory = GuestMemory()
        memory.add_region(self.base, self.size, self.fd)
        return memory

    def poke(self, gpa: int, data: bytes) -> None:
        """Writes as the guest would."""
        os.pwrite(self.fd, data, gpa - self.base)

    def peek(self, gpa: int, length: int) -> bytes:
        """Reads as the guest would."""
        return os.pread(self.fd, length, gpa - self.base)

    def close(self) -> None:
        os.close(self.fd)


def scattered(count: int, first: int = BASE_PFN) -> list[int]:
    """Returns ``count`` PFNs from ``first`` on, in no order that a run could be made of."""
    return [first + (i // 2 if i % 2 == 0 else count - 1 - i // 2) for i in range(count)]
