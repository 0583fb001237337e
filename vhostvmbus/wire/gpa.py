# SPDX-License-Identifier: GPL-2.0-or-later
"""GPA ranges: how VMBus describes guest pages, in GPADLs and in GPA-direct packets.

Layout (``struct gpa_range`` of ``include/linux/hyperv.h``; docs/vhost-user-vmbus.md, *Terms*):
``byte_count u32, byte_offset u32, pfn u64[ceil((byte_offset + byte_count) / 4096)]``, one range
right behind the other. A PFN is a guest-physical address divided by 4096.

The engine has a parser of its own for packets (it also translates); the two are tested against
each other.
"""

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vhostvmbus.wire.errors import (
    GpaRangeCountInvalid,
    GpaRangeEmpty,
    GpaRangeTooLong,
    GpaRangeTruncated,
)
from vhostvmbus.wire.vmbus import PAGE_SIZE

RANGE_HEADER_SIZE = 8
_HEADER = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class GpaRange:
    """``byte_count`` bytes that start ``byte_offset`` bytes into the first page of ``pfns``."""

    byte_count: int
    byte_offset: int
    pfns: Sequence[int]

    @property
    def wire_size(self) -> int:
        """The bytes that this range takes in a packet."""
        return RANGE_HEADER_SIZE + 8 * len(self.pfns)

    @classmethod
    def of_pages(cls, pfns: Sequence[int]) -> "GpaRange":
        """Returns a range of whole pages, as ``VmbPacketSendWithExternalPfns`` describes them:
        offset 0."""
        return cls(len(pfns) * PAGE_SIZE, 0, pfns)


def pfn_count(byte_offset: int, byte_count: int) -> int:
    """Returns how many PFNs a range has: ``ceil((byte_offset + byte_count) / 4096)``."""
    return (byte_offset + byte_count + PAGE_SIZE - 1) // PAGE_SIZE


def build_ranges(ranges: Iterable[GpaRange]) -> bytes:
    """Returns the wire bytes of ``ranges``. Counts are written as given, so that tests can lie."""
    parts = []
    for item in ranges:
        parts.append(_HEADER.pack(item.byte_count, item.byte_offset))
        parts.append(array("Q", item.pfns).tobytes())
    return b"".join(parts)


def parse_ranges(
    data: bytes | bytearray | memoryview,
    count: int,
    *,
    offset: int = 0,
    max_bytes: int = 1 << 40,
) -> list[GpaRange]:
    """Returns ``count`` ranges from ``data[offset:]``; bytes left over behind the last are ignored.

    ``data`` must be private memory. Raises :exc:`GpaRangeTruncated` if ``data`` ends early,
    :exc:`GpaRangeEmpty` for a range of zero bytes, :exc:`GpaRangeTooLong` if the ranges describe
    more than ``max_bytes``, :exc:`GpaRangeCountInvalid` if there are none or more than fit.
    """
    if count < 1 or count > len(data) // RANGE_HEADER_SIZE:
        raise GpaRangeCountInvalid("range_count", count, offset)
    ranges = []
    total = 0
    for _ in range(count):
        if offset + RANGE_HEADER_SIZE > len(data):
            raise GpaRangeTruncated("byte_count", len(data) - offset, offset)
        byte_count, byte_offset = _HEADER.unpack_from(data, offset)
        if byte_count == 0:
            raise GpaRangeEmpty("byte_count", byte_count, offset)
        total += byte_count
        if total > max_bytes:
            raise GpaRangeTooLong("byte_count", total, offset)
        size = 8 * pfn_count(byte_offset, byte_count)
        start = offset + RANGE_HEADER_SIZE
        if start + size > len(data):
            raise GpaRangeTruncated("pfn_count", size // 8, offset)
        pfns = array("Q")
        pfns.frombytes(bytes(data[start : start + size]))
        ranges.append(GpaRange(byte_count, byte_offset, pfns))
        offset = start + size
    return ranges
