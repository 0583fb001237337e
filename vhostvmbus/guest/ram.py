# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest's RAM: memfds, mapped, with a page allocator.

Guest-physical addresses need not be contiguous: the default has a hole, and a second region
whose file offset is not zero, as a hypervisor's memory table has.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vhostvmbus.guest.errors import OutOfPages
from vhostvmbus.memory import GuestMemory
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.wire.vmbus import PAGE_SIZE

MIB = 1 << 20

DEFAULT_REGIONS = ((0, 32 * MIB), (0x1_0000_0000, 32 * MIB))
"""``(guest_phys_addr, size)``: low memory, and more beyond 4 GiB."""

_FILE_OFFSET = 16 * PAGE_SIZE
"""Every second region's memory starts here in its file."""


@dataclass(frozen=True, slots=True)
class RamRegion:
    """A region, as ``ADD_MEM_REG`` describes it."""

    guest_phys_addr: int
    size: int
    fd: int
    mmap_offset: int

    @property
    def user_addr(self) -> int:
        """The user address, made up: nothing is addressed by it, but it has to be unique."""
        return 0x7000_0000_0000 + self.guest_phys_addr

    def message(self) -> m.MemoryRegion:
        """Returns the region as a message of the front end names it."""
        return m.MemoryRegion(self.guest_phys_addr, self.size, self.user_addr, self.mmap_offset)


class GuestRam:
    """RAM in memfds, and who uses which page.

    Page frame numbers are guest-physical addresses divided by 4096.  Page 0 is never handed
    out.  Methods may be called from any thread.
    """

    def __init__(self, regions: Sequence[tuple[int, int]] = DEFAULT_REGIONS, seed: int = 1) -> None:
        self.memory = GuestMemory()
        self.regions: list[RamRegion] = []
        self._free: dict[int, None] = {}
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        try:
            for guest_phys_addr, size in regions:
                self.add(guest_phys_addr, size)
        except BaseException:
            self.close()
            raise

    def add(self, guest_phys_addr: int, size: int) -> RamRegion:
        """Plugs in more memory (bytes). The back end has to be told by the caller."""
        offset = _FILE_OFFSET if len(self.regions) % 2 else 0
        fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, offset + size)
            self.memory.add_region(guest_phys_addr, size, fd, offset)
        except BaseException:
            os.close(fd)
            raise
        region = RamRegion(guest_phys_addr, size, fd, offset)
        with self._lock:
            self.regions.append(region)
            first = guest_phys_addr // PAGE_SIZE
            self._free.update(
                dict.fromkeys(range(max(1, first), (guest_phys_addr + size) // PAGE_SIZE))
            )
        return region

    def remove(self, region: RamRegion) -> None:
        """Unplugs a region. The back end has to be told by the caller, before."""
        with self._lock:
            self.regions.remove(region)
            first = region.guest_phys_addr // PAGE_SIZE
            for pfn in range(first, first + region.size // PAGE_SIZE):
                self._free.pop(pfn, None)
        self.memory.remove_region(region.guest_phys_addr, region.size)
        os.close(region.fd)

    def close(self) -> None:
        """Unmaps and closes all regions."""
        self.memory.close()
        with self._lock:
            for region in self.regions:
                os.close(region.fd)
            self.regions.clear()
            self._free.clear()

    # ---- pages ----

    def alloc_pages(self, count: int, *, scattered: bool = True) -> list[int]:
        """Returns the PFNs of ``count`` free pages: all over the place, or consecutive.

        Raises :class:`OutOfPages`.
        """
        with self._lock:
            pfns = self._scattered(count) if scattered else self._consecutive(count)
            for pfn in pfns:
                del self._free[pfn]
        return pfns

    def free_pages(self, pfns: Sequence[int]) -> None:
        """Hands pages back."""
        with self._lock:
            self._free.update(dict.fromkeys(pfns))

    @property
    def free_page_count(self) -> int:
        """The number of pages that nobody has."""
        return len(self._free)

    def _scattered(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPages(f"{count} pages wanted, {len(self._free)} are free")
        return self._random.sample(list(self._free), count)

    def _consecutive(self, count: int) -> list[int]:
        run: list[int] = []
        for pfn in sorted(self._free):
            if run and pfn != run[-1] + 1:
                run.clear()
            run.append(pfn)
            if len(run) == count:
                return run
        raise OutOfPages(f"no {count} consecutive pages are free")

    # ---- bytes ----

    def page(self, pfn: int) -> memoryview:
        """Returns a writable view of one page."""
        return self.memory.translate(pfn * PAGE_SIZE, PAGE_SIZE)[0].view

    def read(
        self, pfns: Sequence[int], byte_offset: int = 0, byte_count: int | None = None
    ) -> bytes:
        """Returns ``byte_count`` bytes (default: all), ``byte_offset`` bytes into the pages."""
        whole = b"".join(self.page(pfn) for pfn in pfns)
        end = len(whole) if byte_count is None else byte_offset + byte_count
        return whole[byte_offset:end]

    def write(self, pfns: Sequence[int], data: bytes, byte_offset: int = 0) -> None:
        """Writes ``data``, starting ``byte_offset`` bytes into the pages."""
        done = 0
        for view in islice(self._views(pfns), byte_offset // PAGE_SIZE, None):
            start = (byte_offset + done) % PAGE_SIZE
            part = data[done : done + PAGE_SIZE - start]
            view[start : start + len(part)] = part
            done += len(part)
            if done == len(data):
                return
        if done < len(data):
            raise ValueError(f"{len(data)} bytes do not fit behind {byte_offset} in the pages")

    def _views(self, pfns: Sequence[int]) -> Iterator[memoryview]:
        return (self.page(pfn) for pfn in pfns)
