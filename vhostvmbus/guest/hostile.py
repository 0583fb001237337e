# SPDX-License-Identifier: GPL-2.0-or-later
"""A channel's rings, byte by byte: for tests that play a guest which lies.

Nothing here keeps the protocol.  Offsets are bytes into a ring's data area; indices are
those of ``struct hv_ring_buffer``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from vhostvmbus.ring import Ring, signal
from vhostvmbus.wire.gpa import GpaRange, build_ranges
from vhostvmbus.wire.vmbus import (
    COMPLETION_REQUESTED,
    DESCRIPTOR_SIZE,
    GPA_DIRECT_HEADER_SIZE,
    RING_FEATURE_BITS,
    RING_HEADER_SIZE,
    RING_INTERRUPT_MASK,
    RING_PENDING_SEND_SZ,
    RING_READ_INDEX,
    RING_WRITE_INDEX,
    TRAILER_SIZE,
    Descriptor,
    PacketType,
    align8,
    pack_descriptor,
)

_U32 = struct.Struct("<I")


class RawRing:
    """One ring: its header fields and its data, to be read and written at will."""

    def __init__(self, pages: memoryview) -> None:
        self.header = pages[:RING_HEADER_SIZE]
        self.data = pages[RING_HEADER_SIZE:]

    def field(self, offset: int) -> int:
        """Returns a header field, by its offset."""
        return int(_U32.unpack_from(self.header, offset)[0])

    def set_field(self, offset: int, value: int) -> None:
        """Writes a header field."""
        _U32.pack_into(self.header, offset, value & 0xFFFFFFFF)

    @property
    def write_index(self) -> int:
        """``write_index``."""
        return self.field(RING_WRITE_INDEX)

    @write_index.setter
    def write_index(self, value: int) -> None:
        self.set_field(RING_WRITE_INDEX, value)

    @property
    def read_index(self) -> int:
        """``read_index``."""
        return self.field(RING_READ_INDEX)

    @read_index.setter
    def read_index(self, value: int) -> None:
        self.set_field(RING_READ_INDEX, value)

    @property
    def interrupt_mask(self) -> int:
        """``interrupt_mask``."""
        return self.field(RING_INTERRUPT_MASK)

    @interrupt_mask.setter
    def interrupt_mask(self, value: int) -> None:
        self.set_field(RING_INTERRUPT_MASK, value)

    @property
    def pending_send_size(self) -> int:
        """``pending_send_sz``."""
        return self.field(RING_PENDING_SEND_SZ)

    @pending_send_size.setter
    def pending_send_size(self, value: int) -> None:
        self.set_field(RING_PENDING_SEND_SZ, value)

    @property
    def feature_bits(self) -> int:
        """``feature_bits``."""
        return self.field(RING_FEATURE_BITS)

    @feature_bits.setter
    def feature_bits(self, value: int) -> None:
        self.set_field(RING_FEATURE_BITS, value)

    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes into the data area, wrapping at its end."""
        for at, byte in enumerate(data, offset):
            self.data[at % len(self.data)] = byte

    def read(self, offset: int, size: int) -> bytes:
        """Returns bytes of the data area, wrapping at its end."""
        return bytes(self.data[at % len(self.data)] for at in range(offset, offset + size))

    def put(self, data: bytes) -> int:
        """Writes ``data`` at the write index and advances it; returns the offset of the data."""
        start = self.write_index
        self.write(start, data)
        self.write_index = (start + len(data)) % len(self.data)
        return start


class HostileChannel:
    """Raw access to an open channel of the software guest.

    The engine in the guest's role keeps its own write index, so a channel that was used
    through here cannot be used through :class:`GuestChannel.send` any more; completions can
    still be received.
    """

    def __init__(self, ring: Ring, kick_fd: int) -> None:
        self.out_ring = RawRing(ring.pages(sending=True))
        """Guest → host, and host → guest."""
        self.in_ring = RawRing(ring.pages(sending=False))
        self._kick_fd = kick_fd

    def kick(self) -> None:
        """Signals the host."""
        signal(self._kick_fd)

    def put_packet(
        self, descriptor: Descriptor, body: bytes, *, trailer: bytes | None = None
    ) -> int:
        """Puts a descriptor and whatever follows it, without a check; then signals."""
        start = self.out_ring.write_index
        raw = pack_descriptor(descriptor) + body
        tail = struct.pack("<II", 0, start) if trailer is None else trailer
        self.out_ring.put(raw + tail)
        self.kick()
        return start

    def put_gpa_direct(
        self,
        ranges: Sequence[GpaRange],
        payload: bytes = b"",
        *,
        transaction_id: int = 1,
        range_count: int | None = None,
        flags: int = COMPLETION_REQUESTED,
        offset8: int | None = None,
        len8: int | None = None,
    ) -> int:
        """Puts a GPA-direct packet whose counts may lie."""
        header = struct.pack("<II", 0, len(ranges) if range_count is None else range_count)
        header += build_ranges(ranges)
        body = header + payload.ljust(align8(len(payload)), b"\0")
        true_offset = (DESCRIPTOR_SIZE + len(header)) // 8
        true_length = (DESCRIPTOR_SIZE + len(body)) // 8
        descriptor = Descriptor(
            PacketType.DATA_USING_GPA_DIRECT,
            true_offset if offset8 is None else offset8,
            true_length if len8 is None else len8,
            flags,
            transaction_id,
        )
        return self.put_packet(descriptor, body)


__all__ = [
    "DESCRIPTOR_SIZE",
    "GPA_DIRECT_HEADER_SIZE",
    "TRAILER_SIZE",
    "HostileChannel",
    "RawRing",
]
