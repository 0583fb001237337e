# SPDX-License-Identifier: GPL-2.0-or-later
"""The ring engine against a peer that puts anything at all into a ring.

A model in Python, written from the format alone, says what the engine has to make of it.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ram import BASE_PFN, Ram, scattered
from tests.support.rings import raw_packet
from tests.support.soak import examples
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import PacketLimits, Ring, Role
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange, build_ranges, parse_ranges
from vhostvmbus.wire.vmbus import PAGE_SIZE, PacketType

RAM_PAGES = 32
DATA_PAGES = 3
SIZE = DATA_PAGES * PAGE_SIZE
LIMITS = PacketLimits(2048, 1 << 20, 16)
INBAND, DIRECT = PacketType.DATA_INBAND, PacketType.DATA_USING_GPA_DIRECT


class Seen(NamedTuple):
    """What came of one packet."""

    transaction_id: int
    payload: bytes
    error: str | None
    external: int


class Bench:
    """A host's ring whose bytes the test writes."""

    def __init__(self) -> None:
        self.ram = Ram(RAM_PAGES)
        self.memory: GuestMemory = self.ram.memory()
        self.pfns = scattered(DATA_PAGES + 1 + 2)
        Ring(self.memory, self.pfns, DATA_PAGES + 1, Role.GUEST, initialize=True).close()
        self.ring = Ring(self.memory, self.pfns, DATA_PAGES + 1, limits=LIMITS)

    def fill(self, data: bytes, write_index: int) -> None:
        pages = self.ring.pages(False)
        pages[PAGE_SIZE : PAGE_SIZE + len(data)] = data
        pages[0:4] = write_index.to_bytes(4, "little")

    def drain(self) -> tuple[list[Seen], errors.GuestError | None]:
        seen = []
        for _ in range(10000):
            batch = self.ring.receive(8)
            for p in batch.packets:
                external = 0
                if p.external_data is not None:
                    external = len(p.external_data)
                    assert len(p.external_data.read()) == external
                    p.external_data.close()
                name = type(p.error).__name__ if p.error else None
                seen.append(Seen(p.transaction_id, p.payload, name, external))
            if batch.error is not None or not batch.packets:
                return seen, batch.error
        raise AssertionError("the ring never runs empty")

    def close(self) -> None:
        self.ring.close()
        self.memory.close()
        self.ram.close()


def model(data: bytes, write_index: int) -> tuple[list[Seen], str | None]:
    """What a reader makes of ``data`` from index 0, by the format's definition."""
    if write_index % 8 or write_index >= SIZE:
        return [], "RingIndexInvalid"
    data = data.ljust(SIZE, b"\0")
    at, seen = 0, []
    while at != write_index:
        available = write_index - at
        if available < 24:
            return seen, "DescriptorTruncated"
        kind, offset8, len8, _, transaction = struct.unpack_from("<HHHHQ", data, at)
        if len8 < 2 or len8 * 8 + 8 > available:
            return seen, "PacketLengthInvalid"
        if offset8 < 2 or offset8 > len8:
            return seen, "PacketOffsetInvalid"
        packet = data[at : at + len8 * 8]
        seen.append(model_packet(kind, packet, offset8 * 8, transaction))
        at += len8 * 8 + 8
    return seen, None


def model_packet(kind: int, packet: bytes, offset: int, transaction: int) -> Seen:
    payload = packet[offset:]
    error, external = None, 0
    if kind not in (6, 9, 10, 11):
        error = "PacketTypeUnexpected"
    elif len(payload) > LIMITS.max_payload:
        error = "PacketTooLarge"
    elif kind == 9:
        try:
            external = model_external(packet[:offset])
        except errors.GuestError as guest_error:
            error = type(guest_error).__name__
    return Seen(transaction, payload, error, external)


def model_external(header: bytes) -> int:
    if len(header) < 24:
        raise errors.GpaRangeTruncated("offset8", len(header) // 8)
    count = int.from_bytes(header[20:24], "little")
    room = header[24:]
    if not 1 <= count <= min(LIMITS.max_external_ranges, len(room) // 8):
        raise errors.GpaRangeCountInvalid("range_count", count)
    at = 0
    total = 0
    for _ in range(count):
        if len(room) - at < 8:
            raise errors.GpaRangeTruncated("byte_count", len(room) - at)
        (item,) = parse_ranges(room[at:], 1, max_bytes=LIMITS.max_external_data - total)
        for pfn in item.pfns:
            if not BASE_PFN <= pfn < BASE_PFN + RAM_PAGES:
                raise errors.PfnOutsideMemory("pfn", pfn)
        total += item.byte_count
        at += item.wire_size
    return total


def check(data: bytes, write_index: int) -> None:
    bench = Bench()
    try:
        bench.fill(data, write_index)
        seen, error = bench.drain()
        expected, expected_error = model(data, write_index)
        assert seen == expected
        assert (type(error).__name__ if error else None) == expected_error
        if error is not None:
            assert error.closes_channel
            assert 0 <= error.offset < SIZE
        assert bench.memory.regions[0].users == 0
    finally:
        bench.close()


@given(st.binary(max_size=400), st.integers(0, 420))
@settings(max_examples=examples(150), deadline=None)
def test_any_bytes(data: bytes, write_index: int) -> None:
    check(data, write_index)


@given(st.binary(max_size=64), st.integers(0, (1 << 32) - 1))
@settings(max_examples=examples(50), deadline=None)
def test_any_index(data: bytes, write_index: int) -> None:
    check(data, write_index)


small = st.integers(0, 12)
pfns = st.one_of(
    st.integers(BASE_PFN - 1, BASE_PFN + RAM_PAGES), st.sampled_from([0, 1 << 52, (1 << 64) - 1])
)
ranges = st.builds(
    GpaRange,
    st.one_of(st.integers(0, 9000), st.just(0xFFFFFFFF)),
    st.one_of(st.integers(0, 9000), st.just(0xFFFFFFFF)),
    st.lists(pfns, max_size=4),
)


@st.composite
def packets(draw: st.DrawFn) -> bytes:
    """A packet that is right in most of its fields."""
    kind = draw(st.sampled_from([INBAND, DIRECT, DIRECT, DIRECT, 11, 10, 7, 0, 0xFFFF]))
    header = b""
    if kind == DIRECT:
        items = draw(st.lists(ranges, max_size=3))
        count = draw(st.one_of(st.just(len(items)), st.sampled_from([0, 1, 17, 0xFFFFFFFF])))
        header = struct.pack("<II", 0, count) + build_ranges(items)
        header += bytes(draw(st.sampled_from([0, 0, 8, 64])))
    return raw_packet(
        kind,
        draw(st.binary(max_size=80)),
        header=header,
        transaction_id=draw(st.integers(0, (1 << 64) - 1)),
        offset8=draw(st.one_of(st.none(), st.none(), st.none(), small)),
        len8=draw(st.one_of(st.none(), st.none(), st.none(), small)),
    )


@given(st.lists(packets(), max_size=12), st.integers(-16, 16))
@settings(max_examples=examples(100), deadline=None)
def test_packets_that_are_almost_right(items: list[bytes], off_by: int) -> None:
    data = b"".join(items)
    check(data, max(0, len(data) + (off_by // 8 * 8 if off_by > 8 else 0)))


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.mark.parametrize(
    ("packet", "name", "field", "value", "where"),
    [
        (
            raw_packet(9, header=struct.pack("<II", 0, 0)),
            "GpaRangeCountInvalid",
            "range_count",
            0,
            20,
        ),
        (raw_packet(9, header=bytes(0)), "GpaRangeTruncated", "offset8", 2, 2),
        (
            raw_packet(9, header=struct.pack("<IIIIQ", 0, 1, 4096, 0, 5)),
            "PfnOutsideMemory",
            "pfn",
            5,
            32,
        ),
        (
            raw_packet(9, header=struct.pack("<IIIIQ", 0, 1, 0, 7, 5)),
            "GpaRangeEmpty",
            "byte_count",
            0,
            24,
        ),
        (
            raw_packet(9, header=struct.pack("<IIIIQ", 0, 1, 4096, 1, BASE_PFN)),
            "GpaRangeTruncated",
            "pfn_count",
            2,
            24,
        ),
        (
            raw_packet(9, header=struct.pack("<IIIIQ", 0, 1, (1 << 20) + 1, 0, 5)),
            "GpaRangeTooLong",
            "byte_count",
            (1 << 20) + 1,
            24,
        ),
        (raw_packet(8, b"12345678"), "PacketTypeUnexpected", "type", 8, 0),
    ],
)
def test_a_bad_packet_is_named_and_the_next_one_comes(
    bench: Bench, packet: bytes, name: str, field: str, value: int, where: int
) -> None:
    first = raw_packet(6, b"before")
    last = raw_packet(6, b"after", transaction_id=99)
    data = first + packet + last
    bench.fill(data, len(data))
    batch = bench.ring.receive()
    assert batch.error is None
    assert [p.transaction_id for p in batch.packets] == [1, 1, 99]
    error = batch.packets[1].error
    assert error is not None
    assert (type(error).__name__, error.field, error.value) == (name, field, value)
    assert error.offset == len(first) + where
    assert not error.closes_channel


def test_packets_before_a_broken_one_still_come(bench: Bench) -> None:
    data = raw_packet(6, b"good") * 3 + raw_packet(6, b"bad", len8=1)
    bench.fill(data, len(data))
    batch = bench.ring.receive()
    assert len(batch.packets) == 3
    assert isinstance(batch.error, errors.PacketLengthInvalid)
    assert (batch.error.field, batch.error.value, batch.error.offset) == ("len8", 1, 96)
    assert isinstance(bench.ring.receive().error, errors.PacketLengthInvalid)
