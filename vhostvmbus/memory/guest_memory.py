# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's RAM as the front end shared it: regions of files, mapped.

docs/vhost-user-vmbus.md, *Guest memory*. Regions are whole 4 KiB pages, do not overlap, and lie
within their files. Look-ups (in C, without the GIL) see an immutable snapshot of the map.
"""

import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vhostvmbus.engine import ffi, lib
from vhostvmbus.engine.faults import error_of
from vhostvmbus.memory.external import ExternalData, ReadOnlyExternalData
from vhostvmbus.memory.written import WrittenMemory
from vhostvmbus.wire.errors import (
    PfnOutsideMemory,
    RegionBusy,
    RegionInvalid,
    RegionOverlap,
    RegionUnknown,
)
from vhostvmbus.wire.gpa import MAX_REGIONS, GpaRange, build_ranges
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import PAGE_SIZE

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_memory, vvb_region

UNLIMITED_BYTES = 1 << 40


class Region:
    """One mapped stretch of guest RAM. ``view`` is a writable view of all of it."""

    __slots__ = ("_handle", "guest_phys_addr", "size", "view")

    def __init__(self, guest_phys_addr: int, size: int, handle: "Pointer[vvb_region]") -> None:
        self.guest_phys_addr = guest_phys_addr
        self.size = size
        self._handle = handle
        # The buffer keeps the mapping's owner alive, and every slice of the view the buffer:
        # memory is unmapped when the last view has gone, never before.
        owner = ffi.gc(lib.vvb_region_host(handle), _keep(handle))
        self.view = memoryview(ffi.buffer(owner, size))

    @property
    def handle(self) -> "Pointer[vvb_region]":
        """The engine's ``struct vvb_region *``."""
        return self._handle

    @property
    def end(self) -> int:
        """The first guest-physical address behind the region."""
        return self.guest_phys_addr + self.size

    @property
    def users(self) -> int:
        """Uses by packets and GPADL mappings that are alive."""
        return int(lib.vvb_region_users(self._handle))

    @property
    def lost(self) -> bool:
        """Whether pages of it vanished because the file was truncated."""
        return bool(lib.vvb_region_lost(self._handle))

    def __repr__(self) -> str:
        return f"<Region {self.guest_phys_addr:#x}-{self.end:#x}>"


def _keep(handle: "Pointer[vvb_region]") -> Callable[[object], None]:
    """A destructor for a view's owner that does nothing but hold the region until then."""

    def drop(_: object) -> None:
        _ = handle

    return drop


class Span(NamedTuple):
    """A stretch of guest memory that is contiguous in one region."""

    guest_phys_addr: int
    length: int
    view: memoryview


class GuestMemory:
    """The memory map of one guest. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle = ffi.gc(lib.vvb_memory_new(), lib.vvb_memory_free)
        if self._handle == ffi.NULL:
            raise MemoryError("guest memory map")
        self.written = WrittenMemory(self._handle)
        """The tracker that everybody reports to who writes to this memory."""
        self._regions: list[Region] = []
        self._by_handle: dict[int, Region] = {}
        self._retiring: list[Region] = []

    @property
    def handle(self) -> "Pointer[vvb_memory]":
        """The engine's ``struct vvb_memory *``."""
        return self._handle

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions, by address."""
        return tuple(self._regions)

    # -- the map -------------------------------------------------------------------------------

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> Region:
        """Maps ``size`` bytes of ``fd`` from ``mmap_offset`` at ``guest_phys_addr``.

        The caller keeps ``fd``. Raises :exc:`RegionInvalid` (empty, not whole pages, wraps around,
        file too short, too many, mapping refused) or :exc:`RegionOverlap`.
        """
        if size <= 0 or any(x % PAGE_SIZE for x in (guest_phys_addr, size, mmap_offset)):
            raise RegionInvalid(
                f"region {guest_phys_addr:#x} + {size:#x} from {mmap_offset:#x}: not whole pages"
            )
        if guest_phys_addr < 0 or guest_phys_addr + size > 1 << 64:
            raise RegionInvalid(f"region {guest_phys_addr:#x} + {size:#x} wraps around")
        if mmap_offset < 0 or mmap_offset + size > 1 << 62:
            raise RegionInvalid(f"file offset {mmap_offset:#x} + {size:#x} is out of range")
        self._check_file(fd, mmap_offset + size)
        with self._lock:
            if len(self._regions) >= MAX_REGIONS:
                raise RegionInvalid(
                    f"more than {MAX_REGIONS} memory regions", NtStatus.INSUFFICIENT_RESOURCES
                )
            for other in self._regions:
                if guest_phys_addr < other.end and other.guest_phys_addr < guest_phys_addr + size:
                    raise RegionOverlap(
                        f"region {guest_phys_addr:#x} + {size:#x} overlaps {other!r}"
                    )
            error = ffi.new("int *")
            handle = lib.vvb_region_new(guest_phys_addr, size, fd, mmap_offset, error)
            if handle == ffi.NULL:
                raise RegionInvalid(
                    f"region {guest_phys_addr:#x} + {size:#x}: {os.strerror(error[0])}",
                    NtStatus.INSUFFICIENT_RESOURCES,
                )
            region = Region(guest_phys_addr, size, ffi.gc(handle, lib.vvb_region_free, size))
            # Installed while the look-up table has it already: a packet may come in at once.
            self._by_handle[int(ffi.cast("uintptr_t", handle))] = region
            self._install([*self._regions, region])
            return region

    @staticmethod
    def _check_file(fd: int, needed: int) -> None:
        """Refuses what is no file or is shorter than ``needed``."""
        try:
            status = os.fstat(fd)
        except OSError as error:
            raise RegionInvalid(f"a memory region's descriptor: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise RegionInvalid("a memory region's descriptor is not a file")
        if status.st_size < needed:
            raise RegionInvalid(
                f"the region ends at {needed:#x} of its file, which has {status.st_size:#x} bytes"
            )

    def _install(self, regions: list[Region]) -> None:
        regions.sort(key=lambda region: region.guest_phys_addr)
        handles = ffi.new("struct vvb_region *[]", [region.handle for region in regions])
        result = lib.vvb_memory_set(self._handle, handles, len(regions))
        if result:
            raise MemoryError(os.strerror(-result))
        self._regions = regions

    def remove_region(self, guest_phys_addr: int, size: int, timeout: float = 8.0) -> None:
        """Gives a region up; returns when no packet refers to it any more.

        :exc:`RegionUnknown` if there is none exactly like that; :exc:`RegionBusy` after ``timeout``
        seconds: then the region is out of the map for good, and its pages are let go by a later
        change of the map or by :meth:`close`, once its last user is done.
        """
        with self._lock:
            for region in self._regions:
                if (region.guest_phys_addr, region.size) == (guest_phys_addr, size):
                    break
            else:
                raise RegionUnknown(f"no memory region {guest_phys_addr:#x} + {size:#x}")
            self._install([other for other in self._regions if other is not region])
        self._sweep()
        if not self._retire(region, timeout):
            raise RegionBusy(f"{region!r} is still used by {region.users} packets")

    def _retire(self, region: Region, timeout: float) -> bool:
        if lib.vvb_region_wait_unused(region.handle, max(0, int(timeout * 1000))):
            with self._lock:
                self._retiring.append(region)
            return False
        # Views that somebody kept see private zeros from now on, not the guest's memory.
        lib.vvb_region_detach(region.handle)
        with self._lock:
            self._by_handle.pop(int(ffi.cast("uintptr_t", region.handle)), None)
        return True

    def wait_until_unused(self, guest_phys_addr: int, size: int, timeout: float) -> None:
        """Waits once more for a region that :meth:`remove_region` found busy."""
        with self._lock:
            waiting = [
                region
                for region in self._retiring
                if (region.guest_phys_addr, region.size) == (guest_phys_addr, size)
            ]
            for region in waiting:
                self._retiring.remove(region)
        for region in waiting:
            if not self._retire(region, timeout):
                raise RegionBusy(f"{region!r} is still used by {region.users} packets")

    def _sweep(self) -> None:
        """Another try for regions whose users took too long."""
        with self._lock:
            retiring, self._retiring = self._retiring, []
        for region in retiring:
            self._retire(region, 0)

    def close(self, timeout: float = 2.0) -> None:
        """Forgets every region; waits up to ``timeout`` seconds in all for their users.

        The object can be filled again afterwards.
        """
        with self._lock:
            regions = self._regions
            self._install([])
        self._sweep()
        deadline = time.monotonic() + timeout
        for region in regions:
            self._retire(region, deadline - time.monotonic())

    # -- look-up -------------------------------------------------------------------------------

    def view_of(
        self, region: "Pointer[vvb_region]", guest_phys_addr: int, length: int
    ) -> memoryview:
        """A view of memory in an engine's region that is in use (for :class:`ExternalData`)."""
        found = self._by_handle[int(ffi.cast("uintptr_t", region))]
        start = guest_phys_addr - found.guest_phys_addr
        return found.view[start : start + length]

    def translate(self, guest_phys_addr: int, length: int) -> list[Span]:
        """The spans behind guest-physical addresses, in order.

        The views stay valid memory even if the region is removed, but then show zeros. Raises
        :exc:`PfnOutsideMemory` if any byte is not guest RAM.
        """
        spans = []
        regions = self._regions
        while length > 0:
            for region in regions:
                if region.guest_phys_addr <= guest_phys_addr < region.end:
                    break
            else:
                raise PfnOutsideMemory("pfn", guest_phys_addr // PAGE_SIZE)
            size = min(length, region.end - guest_phys_addr)
            start = guest_phys_addr - region.guest_phys_addr
            spans.append(Span(guest_phys_addr, size, region.view[start : start + size]))
            guest_phys_addr += size
            length -= size
        return spans

    def external_data(
        self,
        ranges: Sequence[GpaRange],
        *,
        max_bytes: int = UNLIMITED_BYTES,
        max_ranges: int = 0xFFFFFFFF,
        read_only: bool = False,
    ) -> ExternalData:
        """The memory that ``ranges`` describe. Raises the :exc:`GpaRangeError` that applies."""
        data = build_ranges(ranges)
        segs = ffi.new("struct vvb_segs *")
        fault = ffi.new("struct vvb_fault *")
        try:
            if lib.vvb_translate(
                self._handle, data, len(data), len(ranges), max_bytes, max_ranges, segs, fault
            ):
                raise error_of(fault)
            raw = bytes(ffi.buffer(segs.v, segs.count * ffi.sizeof("struct vvb_seg")))
            kept = list(ranges)
            kind = ReadOnlyExternalData if read_only else ExternalData
            return kind(self, raw, segs.total, lambda: kept)
        finally:
            lib.vvb_segs_free(segs)
