# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire room: descriptors, GUIDs, GPA ranges, errors."""

import pickle
import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange, build_ranges, parse_ranges, pfn_count
from vhostvmbus.wire.guid import guid_from_wire, guid_to_wire
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import Descriptor, align8, pack_descriptor

PFNS = st.integers(0, (1 << 64) - 1)


@st.composite
def ranges(draw: st.DrawFn) -> GpaRange:
    byte_count = draw(st.integers(1, 5 * 4096))
    byte_offset = draw(st.integers(0, 3 * 4096))
    count = pfn_count(byte_offset, byte_count)
    return GpaRange(byte_count, byte_offset, draw(st.lists(PFNS, min_size=count, max_size=count)))


def same(a: list[GpaRange], b: list[GpaRange]) -> bool:
    return [(x.byte_count, x.byte_offset, list(x.pfns)) for x in a] == [
        (x.byte_count, x.byte_offset, list(x.pfns)) for x in b
    ]


@given(st.lists(ranges(), min_size=1, max_size=5), st.binary(max_size=20))
def test_ranges_come_back_as_they_were_built(items: list[GpaRange], slack: bytes) -> None:
    data = build_ranges(items)
    assert len(data) == sum(item.wire_size for item in items)
    assert same(parse_ranges(data + slack, len(items)), items)


@given(st.lists(ranges(), min_size=1, max_size=4), st.data())
def test_ranges_cut_short_are_named(items: list[GpaRange], data: st.DataObject) -> None:
    whole = build_ranges(items)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises((errors.GpaRangeTruncated, errors.GpaRangeCountInvalid)):
        parse_ranges(whole[:cut], len(items))


@given(st.binary(max_size=200), st.integers(-1, 1 << 32), st.integers(0, 64))
def test_no_bytes_crash_the_range_parser(data: bytes, count: int, offset: int) -> None:
    try:
        parsed = parse_ranges(data, count, offset=offset)
    except errors.GpaRangeError:
        return
    assert len(parsed) == count
    assert build_ranges(parsed) == data[offset : offset + len(build_ranges(parsed))]


def test_range_limits_are_named() -> None:
    with pytest.raises(errors.GpaRangeEmpty):
        parse_ranges(struct.pack("<II", 0, 0), 1)
    with pytest.raises(errors.GpaRangeTooLong) as caught:
        parse_ranges(build_ranges([GpaRange(8192, 0, [1, 2])]), 1, max_bytes=8191)
    assert caught.value.value == 8192
    with pytest.raises(errors.GpaRangeCountInvalid):
        parse_ranges(b"", 0)


@given(
    st.builds(
        Descriptor,
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, 0xFFFF),
        st.integers(0, (1 << 64) - 1),
    )
)
def test_descriptors_are_five_little_endian_fields(descriptor: Descriptor) -> None:
    data = pack_descriptor(descriptor)
    assert len(data) == 16
    assert [int.from_bytes(data[at : at + 2], "little") for at in range(0, 8, 2)] == [
        *descriptor[:4]
    ]
    assert int.from_bytes(data[8:], "little") == descriptor.transaction_id


def test_descriptor_layout_is_the_guests() -> None:
    # struct vmpacket_descriptor: u16 type, offset8, len8, flags; u64 trans_id
    assert pack_descriptor(Descriptor(9, 2, 0x0304, 1, 0x1122334455667788)) == bytes.fromhex(
        "0900 0200 0403 0100 8877665544332211"
    )


def test_guids_have_little_endian_fields() -> None:
    # HV_SCSI_GUID of include/linux/hyperv.h
    scsi = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
    assert guid_to_wire(scsi) == bytes.fromhex("d96361ba a104 294d b605 72e2ffb1dc7f")
    assert guid_from_wire(guid_to_wire(scsi)) == scsi
    assert guid_to_wire(None) == bytes(16)


@given(st.integers(0, 1 << 20))
def test_align8(length: int) -> None:
    assert align8(length) % 8 == 0
    assert 0 <= align8(length) - length < 8


def test_errors_carry_field_value_and_offset() -> None:
    error = errors.PfnOutsideMemory("pfn", 0x1234, 0x40)
    assert (error.field, error.value, error.offset) == ("pfn", 0x1234, 0x40)
    assert "0x1234" in str(error)
    assert "0x40" in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.field, copy.value, copy.offset) == ("pfn", 0x1234, 0x40)


def test_only_ring_errors_and_failed_packets_close_a_channel() -> None:
    assert errors.RingIndexInvalid.closes_channel
    assert errors.PacketFailed.closes_channel
    assert not errors.GpaRangeEmpty.closes_channel


def test_refusals_carry_a_status() -> None:
    assert errors.RegionOverlap("x").status is NtStatus.CONFLICTING_ADDRESSES
    assert errors.RegionInvalid("x", NtStatus.NO_MEMORY).status is NtStatus.NO_MEMORY
    assert errors.RefuseOpen(NtStatus.ACCESS_DENIED).status is NtStatus.ACCESS_DENIED
