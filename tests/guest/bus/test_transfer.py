# SPDX-License-Identifier: GPL-2.0-or-later
"""Transfer page packets: bytes that the host puts into pages which the guest lent it."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import Device
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.memory import ExternalData
from vhostvmbus.wire.transfer import (
    build_transfer_pages,
)
from vhostvmbus.wire.vmbus import PacketType

PAGES = 4096 + 3  # more than 16 MiB


class Lender(Device):
    """Maps the GPADL that a packet names; writes at the offsets that further packets name."""

    class_id = UUID("7a7a7a7a-0001-0002-0003-000000000001")
    name = "lender"
    tell = True

    def __init__(self) -> None:
        self.mapping: ExternalData | None = None
        self.views: list[memoryview] = []
        self.returned: list[bytes | None] = []

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if self.mapping is None:
            (handle,) = struct.unpack_from("<I", packet.payload)
            self.mapping = channel.map_gpadl(handle)
            self.views = self.mapping.views(writable=True, noted=False)
            packet.complete()
            return
        offset, length = struct.unpack_from("<II", packet.payload)
        packet.complete()
        at, written = 0, []
        for view, (gpa, _) in zip(self.views, self.mapping.segments, strict=True):
            low, high = max(offset, at), min(offset + length, at + len(view))
            if low < high:
                view[low - at : high - at] = bytes([7]) * (high - low)
                written.append((gpa + low - at, high - low))
            at += len(view)
        channel.send(
            b"look",
            packet_type=PacketType.DATA_USING_XFER_PAGES,
            header=build_transfer_pages(0xCAFE, [(length, offset)]),
            on_completion=self.returned.append,
            written=written if self.tell else (),
        )


@pytest.mark.parametrize("tell", [True, False])
def test_a_large_gpadl_is_written_piecewise(tell: bool) -> None:
    """Only what the packet says was written is looked up in the code map."""
    device = Lender()
    device.tell = tell
    with (
        SoftwareGuest.for_device(device, code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        gpadl = guest.create_gpadl(PAGES)
        pfns = gpadl.owned_pfns
        channel.send(struct.pack("<I", gpadl.gpadl_id))
        assert guest.code_map is not None
        for pfn in (pfns[10], pfns[11], pfns[12], pfns[4098]):
            guest.code_map.mark(pfn)
        for offset, length in ((11 * 4096 - 5, 10), (4098 * 4096 + 4000, 96)):
            channel.send(struct.pack("<II", offset, length))
            packet = channel.receive()
            assert packet.raw.type == PacketType.DATA_USING_XFER_PAGES
            header = packet.raw.raw[16 : packet.raw.payload_offset]
            assert header == struct.pack("<HBxIII", 0xCAFE, 0, 1, length, offset)
            assert packet.payload == b"look\0\0\0\0"
            assert packet.completion_requested
            assert guest.ram.read(pfns, offset, length) == bytes([7]) * length
            assert guest.ram.read(pfns, offset - 1, 1) == b"\0"
            packet.complete(b"taken")
        channel.send(struct.pack("<II", 0, 0))  # behind the completions
        channel.receive()  # and never completed
        pages = [gpa // 4096 for ranges in guest.invalidations for gpa, _ in ranges]
        expected = [*sorted(pfns[10:12]), pfns[4098]]
        assert sorted(pages[:2]) + pages[2:] == (expected if tell else [])
        assert device.returned == [b"taken\0\0\0"] * 2
    assert device.returned == [b"taken\0\0\0"] * 2 + [None]


@given(
    st.integers(0, 0xFFFF),
    st.lists(st.tuples(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF)), max_size=20),
    st.booleans(),
)
def test_the_header_is_the_guests(set_id: int, ranges: list[tuple[int, int]], ours: bool) -> None:
    # struct vmtransfer_page_packet_header: u16 set, u8 sender owns it, u8, u32 count; u32 pairs
    header = build_transfer_pages(set_id, ranges, sender_owns_set=ours)
    numbers = [number for pair in ranges for number in pair]
    assert header == struct.pack(f"<HBBI{len(numbers)}I", set_id, ours, 0, len(ranges), *numbers)
