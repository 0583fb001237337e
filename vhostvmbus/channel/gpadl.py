# SPDX-License-Identifier: GPL-2.0-or-later
"""GPADLs: guest pages that the guest gave a handle. docs/vhost-user-vmbus.md, VMBUS_GPADL_CREATE.

Invariants: every page of a GPADL lay in guest memory when it was created; a GPADL is mapped at most
once at a time; number and pages of a connection's GPADLs are bounded.
"""

import threading
from array import array
from collections.abc import Iterator, Sequence

from vhostvmbus.channel.deadline import Deadline, LeftBehind
from vhostvmbus.memory import ExternalData, GuestMemory
from vhostvmbus.wire.errors import (
    DeviceTimeout,
    GpadlExists,
    GpadlInvalid,
    GpadlLimit,
    GpadlUnknown,
    GpaRangeError,
    UsageError,
)
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import PAGE_SIZE

MAX_GPADLS = 1024
MAX_GPADL_PAGES = 1 << 20
"""Of all GPADLs of a connection together: 4 GiB of guest memory, 8 MiB of PFNs here."""


class Gpadl:
    """One GPADL: its handle, the channel it was made for, and its ranges."""

    def __init__(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> None:
        self.channel = channel
        self.gpadl_id = gpadl_id
        self.ranges = tuple(ranges)
        self.page_count = sum(len(item.pfns) for item in ranges)
        self.mapping: ExternalData | None = None

    def ring_pfns(self) -> "array[int]":
        """Returns all pages, in order. Raises :exc:`GpadlInvalid` if a range is not whole pages."""
        pfns = array("Q")
        for item in self.ranges:
            if item.byte_offset or item.byte_count % PAGE_SIZE:
                raise GpadlInvalid(
                    f"GPADL {self.gpadl_id:#x} is no ring: a range of {item.byte_count} bytes"
                    f" at offset {item.byte_offset} is not whole pages"
                )
            pfns.extend(item.pfns)
        return pfns

    def end_mapping(self, left: LeftBehind, deadline: Deadline) -> bool:
        """Ends the mapping, if there is one.

        Returns whether, before the deadline, nobody is inside it any more.
        """
        mapping = self.mapping
        if mapping is None:
            return True
        try:
            # It may be lent to the device's own data path, which is asked for it.
            left.call(f"GPADL {self.gpadl_id:#x}", mapping.close, deadline).get()
        except DeviceTimeout:
            return False
        return mapping.wait_unused(deadline.left)

    def touches(self, guest_phys_addr: int, size: int) -> bool:
        """Tells whether a page of it lies in these addresses."""
        low, high = guest_phys_addr // PAGE_SIZE, (guest_phys_addr + size) // PAGE_SIZE
        return any(low <= pfn < high for item in self.ranges for pfn in item.pfns)


class GpadlTable:
    """The GPADLs of one connection. Thread-safe."""

    def __init__(self, memory: GuestMemory, left: LeftBehind) -> None:
        self._left = left
        self._in_use: list[ExternalData] = []
        self._memory = memory
        self._lock = threading.Lock()
        self._gpadls: dict[int, Gpadl] = {}
        self._pages = 0

    def __len__(self) -> int:
        return len(self._gpadls)

    def __iter__(self) -> Iterator[Gpadl]:
        return iter(list(self._gpadls.values()))

    @property
    def pages(self) -> int:
        """Counts the pages of all GPADLs together."""
        return self._pages

    def create(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> Gpadl:
        """Adds one. Raises :exc:`GpadlExists`, :exc:`GpadlLimit` or :exc:`GpadlInvalid`."""
        gpadl = Gpadl(channel, gpadl_id, ranges)
        with self._lock:
            if gpadl_id in self._gpadls:
                raise GpadlExists(f"GPADL {gpadl_id:#x} exists already")
            if len(self._gpadls) >= MAX_GPADLS:
                raise GpadlLimit(f"more than {MAX_GPADLS} GPADLs")
            if self._pages + gpadl.page_count > MAX_GPADL_PAGES:
                raise GpadlLimit(f"more than {MAX_GPADL_PAGES} pages in GPADLs")
            try:
                self._memory.external_data(ranges).close()
            except GpaRangeError as error:
                raise GpadlInvalid(f"GPADL {gpadl_id:#x}: {error}") from error
            self._gpadls[gpadl_id] = gpadl
            self._pages += gpadl.page_count
        return gpadl

    def get(self, gpadl_id: int) -> Gpadl:
        """Returns a GPADL. Raises :exc:`GpadlUnknown` if there is none of this id."""
        try:
            return self._gpadls[gpadl_id]
        except KeyError:
            raise GpadlUnknown(f"no GPADL {gpadl_id:#x}") from None

    def remove(self, gpadl_id: int, deadline: Deadline) -> bool:
        """Forgets one. Returns whether, before the deadline, nobody is inside its mapping.

        Raises :exc:`GpadlUnknown` if there is none.
        """
        with self._lock:
            gpadl = self._gpadls.pop(gpadl_id, None)
            if gpadl is None:
                raise GpadlUnknown(f"no GPADL {gpadl_id:#x}")
            self._pages -= gpadl.page_count
        if gpadl.end_mapping(self._left, deadline):
            return True
        assert gpadl.mapping is not None
        self._in_use.append(gpadl.mapping)
        return False

    def transferring(self) -> bool:
        """Tells whether somebody is still at the pages of a GPADL that was removed."""
        with self._lock:
            self._in_use = [data for data in self._in_use if not data.wait_unused(0)]
            return bool(self._in_use)

    def clear(self, deadline: Deadline) -> bool:
        """Forgets them all; otherwise like :meth:`remove`."""
        ended = [self.remove(gpadl.gpadl_id, deadline) for gpadl in self]
        return all(ended)

    def map(self, gpadl_id: int, channel: int, *, read_only: bool = False) -> ExternalData:
        """Maps a GPADL of this channel (VmbChannelMapGpadl); :exc:`UsageError` if it is mapped."""
        gpadl = self.get(gpadl_id)
        if gpadl.channel != channel:
            raise GpadlUnknown(f"GPADL {gpadl_id:#x} belongs to channel {gpadl.channel}")
        with self._lock:
            if gpadl.mapping is not None and not gpadl.mapping.closed:
                raise UsageError(f"GPADL {gpadl_id:#x} is mapped already")
            gpadl.mapping = self._memory.external_data(gpadl.ranges, read_only=read_only)
            return gpadl.mapping

    def unmap(self, gpadl_id: int) -> None:
        """Ends the mapping (VmbChannelUnmapGpadl); :exc:`UsageError` if there is none."""
        gpadl = self.get(gpadl_id)
        mapping, gpadl.mapping = gpadl.mapping, None
        if mapping is None:
            raise UsageError(f"GPADL {gpadl_id:#x} is not mapped")
        mapping.close(wait=True)

    def take_written(self, channel: int) -> list[tuple[int, int]]:
        """Returns the ``(gpa, length)`` written through this channel's mappings since the last
        call."""
        spans: list[tuple[int, int]] = []
        for gpadl in self:
            if gpadl.channel == channel and gpadl.mapping is not None:
                spans.extend(gpadl.mapping.take_written())
        return spans
