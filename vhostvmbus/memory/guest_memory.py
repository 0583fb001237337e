# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest's RAM as the front end shared it: regions of files, mapped.

docs/vhost-user-vmbus.md, *Guest memory*. Regions are whole 4 KiB pages, do not overlap, and lie
within their files. Look-ups (in C, without the GIL) see an immutable snapshot of the map. A change
of the map that is refused has changed nothing.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vhostvmbus.engine import ffi, lib
from vhostvmbus.engine.faults import error_of
from vhostvmbus.memory.external import ExternalData, ReadOnlyExternalData
from vhostvmbus.memory.mappings import MappingBudget
from vhostvmbus.memory.shared_file import is_shared_memory
from vhostvmbus.memory.written import WrittenMemory
from vhostvmbus.wire.errors import (
    PfnOutsideMemory,
    RegionBusy,
    RegionInvalid,
    RegionOverlap,
    RegionUnknown,
)
from vhostvmbus.wire.gpa import GpaRange, build_ranges
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import MAX_REGIONS, SharedRegion, overlap_among
from vhostvmbus.wire.vmbus import PAGE_SIZE

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_memory, vvb_region

UNLIMITED_BYTES = 1 << 40


class _Wanted(NamedTuple):
    """A region that may be mapped, with device and inode of its file."""

    shared: SharedRegion
    file: tuple[int, int]

    @property
    def guest_phys_addr(self) -> int:
        return self.shared.guest_phys_addr

    @property
    def size(self) -> int:
        return self.shared.size

    @property
    def key(self) -> tuple[object, ...]:
        """Addresses, offset and file; the file may come by any descriptor."""
        return (*self.shared._replace(fd=-1), self.file)


class Region:
    """One mapped stretch of guest RAM. ``view`` is a writable view of all of it."""

    __slots__ = ("_handle", "_wanted", "guest_phys_addr", "key", "size", "view")

    def __init__(self, wanted: _Wanted, handle: "Pointer[vvb_region]") -> None:
        self._wanted = wanted
        self.guest_phys_addr = wanted.guest_phys_addr
        self.size = wanted.size
        self.key = wanted.key
        """The file and offset that it is a mapping of: another mapping of the same is no other
        memory."""
        self._handle = handle
        # The buffer keeps the mapping's owner alive, and every slice of the view the buffer:
        # memory is unmapped when the last view has gone, never before.
        owner = ffi.gc(lib.vvb_region_host(handle), _keep(handle))
        self.view = memoryview(ffi.buffer(owner, self.size))

    @property
    def handle(self) -> "Pointer[vvb_region]":
        """The engine's ``struct vvb_region *``."""
        return self._handle

    def again(self) -> _Wanted:
        """Returns what to map for another mapping of the same memory."""
        fd = int(lib.vvb_region_fd(self._handle))
        return _Wanted(self._wanted.shared._replace(fd=fd), self._wanted.file)

    @property
    def end(self) -> int:
        """The first guest-physical address behind the region."""
        return self.guest_phys_addr + self.size

    @property
    def users(self) -> int:
        """The number of uses of the region, by packets and GPADL mappings, that are alive."""
        return int(lib.vvb_region_users(self._handle))

    @property
    def lost(self) -> bool:
        """Tells whether pages of the region vanished because the file was truncated."""
        return bool(lib.vvb_region_lost(self._handle))

    def __repr__(self) -> str:
        return f"<Region {self.guest_phys_addr:#x}-{self.end:#x}>"


def _keep(handle: "Pointer[vvb_region]") -> Callable[[object], None]:
    """Returns a destructor for a view's owner that does nothing but hold the region until then."""

    def drop(_: object) -> None:
        _ = handle

    return drop


def _address_of(handle: "Pointer[vvb_region]") -> int:
    return int(ffi.cast("uintptr_t", handle))


class Span(NamedTuple):
    """A stretch of guest memory that is contiguous in one region."""

    guest_phys_addr: int
    length: int
    view: memoryview


Release = Callable[[Sequence[Region]], None]
"""Returns when nobody uses these regions any more, which no look-up finds; or raises
:exc:`RegionBusy`, and they go back into the map."""


def wait_until_unused(regions: Sequence[Region], timeout: float = 8.0) -> None:
    """Waits ``timeout`` seconds at most, in all. Raises :exc:`RegionBusy`."""
    deadline = time.monotonic() + timeout
    for region in regions:
        left = max(0, int((deadline - time.monotonic()) * 1000))
        if lib.vvb_region_wait_unused(region.handle, left):
            raise RegionBusy(f"{region!r} is still used by {region.users} packets")


def _check(shared: SharedRegion) -> _Wanted:
    """Refuses what cannot be mapped, as far as that can be seen before."""
    guest_phys_addr, size, fd, offset = shared
    if size <= 0 or any(x % PAGE_SIZE for x in (guest_phys_addr, size, offset)):
        raise RegionInvalid(
            f"region {guest_phys_addr:#x} + {size:#x} from {offset:#x}: not whole pages"
        )
    if guest_phys_addr < 0 or guest_phys_addr + size > 1 << 64:
        raise RegionInvalid(f"region {guest_phys_addr:#x} + {size:#x} wraps around")
    if offset < 0 or offset + size > 1 << 62:
        raise RegionInvalid(f"file offset {offset:#x} + {size:#x} is out of range")
    try:
        if not is_shared_memory(fd):
            raise RegionInvalid(
                "a memory region's descriptor is not a file of shared memory: a memfd, or one of"
                " tmpfs"
            )
        status = os.fstat(fd)
    except OSError as error:
        raise RegionInvalid(f"a memory region's descriptor: {error}") from error
    page = lib.vvb_file_page_size(fd)
    if page != PAGE_SIZE:
        raise RegionInvalid(
            f"guest memory in pages of {page >> 10} KiB: rings are mapped in pages of 4 KiB; start"
            " QEMU with memory that is not hugetlb (transparent huge pages will do)",
            NtStatus.NOT_SUPPORTED,
        )
    if status.st_size < offset + size:
        raise RegionInvalid(
            f"the region ends at {offset + size:#x} of its file, which has"
            f" {status.st_size:#x} bytes"
        )
    return _Wanted(shared, (status.st_dev, status.st_ino))


def _check_table(regions: Sequence[Region | _Wanted]) -> None:
    """Refuses regions that cannot be in one map."""
    if len(regions) > MAX_REGIONS:
        raise RegionInvalid(
            f"more than {MAX_REGIONS} memory regions", NtStatus.INSUFFICIENT_RESOURCES
        )
    overlap = overlap_among(regions)
    if overlap is not None:
        below, above = overlap
        raise RegionOverlap(
            f"region {below.guest_phys_addr:#x} + {below.size:#x} overlaps"
            f" {above.guest_phys_addr:#x} + {above.size:#x}"
        )


class GuestMemory:
    """The memory map of one guest. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handle = ffi.gc(lib.vvb_memory_new(), lib.vvb_memory_free)
        if self._handle == ffi.NULL:
            raise MemoryError("guest memory map")
        self.written = WrittenMemory(self._handle)
        """The tracker that everybody reports to who writes to this memory."""
        self.mappings = MappingBudget()
        """The mappings that rings in this memory may take."""
        self._regions: tuple[Region, ...] = ()
        # By the engine's address: the regions of the map, and those that have left it while
        # somebody still used them.
        self._mapped: dict[int, Region] = {}

    @property
    def handle(self) -> "Pointer[vvb_memory]":
        """The engine's ``struct vvb_memory *``."""
        return self._handle

    @property
    def regions(self) -> tuple[Region, ...]:
        """The regions of the map, by address."""
        return self._regions

    # -- the map -------------------------------------------------------------------------------
    #
    # Every change is made in the same order: what may be refused is looked at, what is new is
    # mapped, the new map takes the place of the old one, and whoever uses what has gone is waited
    # for. If any of that fails the map is the one of before.

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> Region:
        """Maps ``size`` bytes of ``fd`` from ``mmap_offset`` at ``guest_phys_addr``.

        The caller keeps ``fd``. Raises :exc:`RegionInvalid` (empty, not whole pages, wraps around,
        file too short, too many, mapping refused) or :exc:`RegionOverlap`; nothing has changed
        then.
        """
        wanted = _check(SharedRegion(guest_phys_addr, size, fd, mmap_offset))
        with self._lock:
            return self._replace([*self._regions, wanted])[-1]

    def remove_region(
        self, guest_phys_addr: int, size: int, release: Release = wait_until_unused
    ) -> None:
        """Gives a region up; returns when no packet refers to it any more.

        Raises :exc:`RegionUnknown` if there is none exactly like that, and :exc:`RegionBusy` after
        ``timeout`` seconds: then the region is out of the map for good, and its pages are unmapped
        by a later change of the map or by :meth:`close`, once its last user is done.
        """
        with self._lock:
            rest = [
                region
                for region in self._regions
                if (region.guest_phys_addr, region.size) != (guest_phys_addr, size)
            ]
            if len(rest) == len(self._regions):
                raise RegionUnknown(f"no memory region {guest_phys_addr:#x} + {size:#x}")
            self._replace(rest, release)

    def set_table(
        self, table: Sequence[SharedRegion], release: Release = wait_until_unused
    ) -> Sequence[Region]:
        """Makes ``table`` the whole map, or changes nothing; returns the regions that have gone.

        What is in the old map and in the table, with the same file, stays mapped. Raises what
        :meth:`add_region` and :meth:`remove_region` raise.
        """
        wanted = [_check(shared) for shared in table]
        with self._lock:
            before = self._regions
            known = {region.key: region for region in before}
            regions = self._replace([known.get(item.key, item) for item in wanted], release)
            return [region for region in before if region not in regions]

    def _replace(
        self, table: Sequence[Region | _Wanted], release: Release = wait_until_unused
    ) -> list[Region]:
        """Makes ``table`` the map, mapping what is new in it, or leaves the map that there is."""
        before = self._regions
        _check_table(table)
        try:
            regions = [item if isinstance(item, Region) else self._map(item) for item in table]
            self._install(regions)
            gone = [region for region in before if region not in regions]
            if gone:
                release(gone)
        except BaseException:
            if self._regions is not before:
                self._install(before)
            raise
        finally:
            self._unmap()
        return regions

    def _map(self, wanted: _Wanted) -> Region:
        error = ffi.new("int *")
        address, size, fd, offset = wanted.shared
        handle = lib.vvb_region_new(address, size, fd, offset, error)
        if handle == ffi.NULL:
            raise RegionInvalid(
                f"region {address:#x} + {size:#x}: {os.strerror(error[0])}",
                NtStatus.INSUFFICIENT_RESOURCES,
            )
        region = Region(wanted, ffi.gc(handle, lib.vvb_region_free, size))
        # Known before the engine has it: a packet may come in at once.
        self._mapped[_address_of(handle)] = region
        return region

    def _install(self, regions: Sequence[Region]) -> None:
        """Has look-ups see ``regions``; returns when none is at work that sees others."""
        ordered = tuple(sorted(regions, key=lambda region: region.guest_phys_addr))
        handles = ffi.new("struct vvb_region *[]", [region.handle for region in ordered])
        result = lib.vvb_memory_set(self._handle, handles, len(ordered))
        if result:
            raise MemoryError(os.strerror(-result))
        self._regions = ordered

    def _unmap(self) -> None:
        """Lets the pages go of each region that is not in the map and that nobody uses."""
        for address, region in list(self._mapped.items()):
            if region not in self._regions and not region.users:
                # Views that somebody kept see private zeros from now on, not the guest's memory.
                lib.vvb_region_detach(region.handle)
                del self._mapped[address]

    def close(self, timeout: float = 2.0) -> None:
        """Forgets every region; waits up to ``timeout`` seconds in all for their users.

        Those who use one still see a private copy of it from then on, and touch the guest's memory
        no more. The object can be filled again afterwards.
        """
        with self._lock:
            self._install(())
            with contextlib.suppress(RegionBusy):
                wait_until_unused(list(self._mapped.values()), timeout)
            self._unmap()
            self._forsake(list(self._mapped.values()))

    def renew(self) -> None:
        """Maps every region anew, and takes the guest's memory from whoever uses the old mappings.

        They see a private copy from then on. Raises :exc:`RegionInvalid` if that cannot be mapped.
        """
        with self._lock:
            before = self._regions
            old = list(self._mapped.values())
            self._install([self._map(region.again()) for region in before])
            self._forsake(old)
            self._unmap()

    @staticmethod
    def _forsake(regions: Sequence[Region]) -> None:
        for region in regions:
            result = lib.vvb_region_forsake(region.handle)
            if result:
                raise MemoryError(os.strerror(-result))

    # -- look-up -------------------------------------------------------------------------------

    def view_of(
        self, region: "Pointer[vvb_region]", guest_phys_addr: int, length: int
    ) -> memoryview:
        """Returns a view of memory in an engine's region in use, for :class:`ExternalData`."""
        found = self._mapped[_address_of(region)]
        start = guest_phys_addr - found.guest_phys_addr
        return found.view[start : start + length]

    def translate(self, guest_phys_addr: int, length: int) -> list[Span]:
        """Returns the spans behind guest-physical addresses, in order.

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
        """Returns the memory that ``ranges`` describe. Raises a :exc:`GpaRangeError`."""
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
