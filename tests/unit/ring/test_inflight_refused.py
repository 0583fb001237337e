# SPDX-License-Identifier: GPL-2.0-or-later
"""Records of packets in flight that a back end must not believe, and regions that can be none."""

import fcntl
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.inflight_rig import (
    CURRENT,
    CURSOR_SIZE,
    FIRST_SLOT,
    INBAND,
    INDEX,
    RX,
    SLOT_SIZE,
    SLOTS,
    TX,
    Rig,
    complete,
    taken,
)
from tests.support.ram import scattered
from vhostvmbus.ring import (
    InflightRegion,
    PacketLimits,
    Ring,
)
from vhostvmbus.ring.inflight import MAX_SLOT_BYTES, SEALS, slot_bytes
from vhostvmbus.wire import errors

SLOT = struct.Struct("<QQHHHHQI")


def slot(number: int, *, done: int = 0, offset8: int = 2, len8: int = 3, at: int = 0) -> bytes:
    return SLOT.pack(number, done, INBAND, offset8, len8, 1, 77, at)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"X"),  # magic
        (8, b"\2"),  # version
        (12, struct.pack("<I", SLOTS + 1)),
        (16, struct.pack("<I", 64)),  # bytes of a slot
        (RX + CURRENT, b"\2"),
        (TX + CURRENT, struct.pack("<I", 0xFFFFFFFF)),
        (FIRST_SLOT, slot(1, len8=1)),
        (FIRST_SLOT, slot(1, len8=0xFFFF)),
        (FIRST_SLOT, slot(1, offset8=1)),
        (FIRST_SLOT, slot(1, offset8=4)),
        (FIRST_SLOT, slot(1, at=4)),
        (FIRST_SLOT, slot(1, at=1 << 20)),
        (FIRST_SLOT + SLOT_SIZE, slot(1)),  # twice the same number
    ],
)
def test_contents_that_make_no_sense_are_refused(rig: Rig, offset: int, data: bytes) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    host.receive()
    rig.poke(offset, data)
    with pytest.raises(errors.InflightInvalid):
        rig.host()
    # The ring itself goes on, from its header, with a record that is empty.
    broken = rig.hosts[-1]
    rig.region.record(1, broken, resume=False)
    rig.send(2)
    assert taken(broken) == [(2, False)]
    assert taken(rig.host()) == [(2, True)]


@pytest.mark.parametrize("which", [RX, TX])
@pytest.mark.parametrize("index", [4, 4096, 0xFFFFFFF8, 2048])
def test_indices_of_another_ring_are_refused(rig: Rig, which: int, index: int) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    complete(host, *host.receive().packets)
    for place in range(2):
        rig.poke(which + place * CURSOR_SIZE + INDEX, struct.pack("<I", index))
    with pytest.raises(errors.InflightInvalid):
        rig.host()


def test_numbers_that_no_back_end_gets_to_are_refused(rig: Rig) -> None:
    rig.host(resume=False)
    rig.poke(RX, struct.pack("<Q", 1 << 63))
    with pytest.raises(errors.InflightInvalid):
        rig.host()


@settings(deadline=None)
@given(
    head=st.binary(max_size=192),
    slots=st.lists(st.tuples(st.integers(0, SLOTS - 1), st.binary(max_size=44)), max_size=12),
)
def test_any_bytes_are_refused_or_replayed(head: bytes, slots: list[tuple[int, bytes]]) -> None:
    rig = Rig()
    host = rig.host(resume=False)
    rig.send(1, 2, 3)
    host.receive()
    rig.poke(32, head)  # its first fields stay, so that more is looked at
    for number, data in slots:
        rig.poke(FIRST_SLOT + number * SLOT_SIZE, data)
    try:
        again = rig.host()
    except errors.InflightInvalid:
        pass
    else:
        for _ in range(4):
            batch = again.receive()
            assert batch.error is None
            complete(again, *batch.packets)
            for packet in batch.packets:
                if packet.external_data is not None:
                    packet.external_data.close()
    rig.close()


def memfd(size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("region", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def test_a_region_is_adopted(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    host.receive()
    mine = rig.region
    rig.region = InflightRegion.adopt(mine.fd, mine.size, 0, mine.channels, mine.slots)
    mine.close()
    assert taken(rig.host()) == [(1, True)]


@pytest.mark.parametrize(
    ("size", "offset", "channels", "slots"),
    [
        (0, 0, 1, 1),
        (16384, 0, 0, 1),
        (16384, 0, 1, 0),
        (16384, 100, 1, 1),
        (16384, 0, 3, 1),
        (16384, 0, 4, 1),  # 4096 bytes each
        (16384, 0, 1, 1000),
        (16384, 4096, 1, 1),  # beyond the end
        (1 << 40, 0, 1, 1),
        ((1 << 64) - 4096, 0, 1, 1),
    ],
)
def test_regions_that_can_be_none_are_refused(
    size: int, offset: int, channels: int, slots: int
) -> None:
    fd = memfd(16384)
    with pytest.raises(errors.InflightInvalid):
        InflightRegion.adopt(fd, size, offset, channels, slots)
    os.close(fd)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, SEALS | fcntl.F_SEAL_WRITE])
def test_a_file_that_may_shrink_or_not_be_written_is_refused(seals: int) -> None:
    fd = memfd(16384, seals)
    with pytest.raises(errors.InflightInvalid):
        InflightRegion.adopt(fd, 16384, 0, 1, 1)
    os.close(fd)


def test_what_is_no_memfd_is_refused() -> None:
    fd = os.eventfd(0)
    with pytest.raises(errors.InflightInvalid):
        InflightRegion.adopt(fd, 16384, 0, 1, 1)
    os.close(fd)


def test_a_file_that_shrinks_all_the_same_does_no_harm(rig: Rig) -> None:
    """The seals forbid it, so this goes past :meth:`InflightRegion.adopt`."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, rig.region.part_bytes)
    rig.region.close()
    rig.region = InflightRegion(fd, 0, rig.region.part_bytes, 2, SLOTS)
    host = Ring(rig.memory, scattered(4), 2)
    rig.hosts.append(host)
    rig.region.record(0, host, resume=False)
    os.ftruncate(fd, 0)
    rig.send(1, 2)
    packets = host.receive().packets
    complete(host, *packets)
    assert [p.transaction_id for p in rig.guest.receive().packets] == [1, 2]
    with pytest.raises(errors.InflightInvalid):
        rig.region.record(0, Ring(rig.memory, scattered(4), 2), resume=True)


def test_a_ring_records_in_one_place(rig: Rig) -> None:
    host = rig.host()
    with pytest.raises(errors.InflightInvalid):
        rig.region.record(0, host, resume=True)


def test_slots_are_as_long_as_the_limits_need() -> None:
    assert slot_bytes(PacketLimits(256, 4096, 1)) < 1024
    assert slot_bytes(PacketLimits()) == MAX_SLOT_BYTES
    assert slot_bytes(PacketLimits(100, 100, 1)) % 64 == 0
