# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of packets in flight: what is in it, what comes out of it, and what is refused.

That nothing is lost or doubled whenever the process ends is inflight_check.c's business.
"""

import fcntl
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.core import BASE_PFN, Ram, ring_pair, scattered
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import (
    InflightRegion,
    Number,
    Operation,
    Outgoing,
    PacketLimits,
    Plan,
    Ring,
    Rule,
)
from vhostvmbus.ring.inflight import MAX_SLOT_BYTES, SEALS, slot_bytes
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import PAGE_SIZE, RING_READ_INDEX, RING_WRITE_INDEX, PacketType

INBAND, COMP = PacketType.DATA_INBAND, PacketType.COMP
SLOTS = 8
SMALL = PacketLimits(128, 1 << 16, 16)
# Offsets in a part: the cursors of both rings (two each, and which one), then the slots.
RX, TX, NOTE, FIRST_SLOT, SLOT_SIZE = 64, 128, 192, PAGE_SIZE, 64
NUMBER, INDEX, CURRENT, CURSOR_SIZE = 0, 8, 32, 16


class Rig:
    """A guest's ring, and hosts one after the other with the same region."""

    def __init__(self, slots: int = SLOTS, limits: PacketLimits = SMALL) -> None:
        self.ram = Ram()
        self.memory: GuestMemory = self.ram.memory()
        self.guest, first = ring_pair(self.memory)
        first.close()
        self.region = InflightRegion.create(2, slots, limits)
        self.hosts: list[Ring] = []

    def host(self, *, resume: bool = True) -> Ring:
        """The next host; the one before does nothing any more, as if it had been killed."""
        host = Ring(self.memory, scattered(4), 2, limits=PacketLimits())
        self.hosts.append(host)
        self.region.record(1, host, resume=resume)
        return host

    def send(self, *transactions: int, payload: bytes = b"payload!", flags: int = 1) -> None:
        for transaction in transactions:
            self.guest.send(INBAND, payload, transaction_id=transaction, flags=flags).check()

    def poke(self, offset: int, data: bytes) -> None:
        """Writes into the part."""
        os.pwrite(self.region.fd, data, self.region.part_bytes + offset)

    def peek(self, offset: int, size: int) -> bytes:
        return os.pread(self.region.fd, size, self.region.part_bytes + offset)

    def close(self) -> None:
        for host in self.hosts:
            host.close()
        self.guest.close()
        self.region.close()
        self.memory.close()
        self.ram.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def taken(ring: Ring, count: int = 64) -> list[tuple[int, bool]]:
    return [(p.transaction_id, p.replayed) for p in ring.receive(count).packets]


def complete(ring: Ring, *packets: object) -> None:
    outgoing = [Outgoing(COMP, b"", p.transaction_id, slot=p.slot) for p in packets]  # type: ignore[attr-defined]
    assert ring.send_many(outgoing).entered == len(packets)


# -- what comes back -----------------------------------------------------------------------------


def test_what_was_not_completed_comes_again_first_and_in_order(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1, 2, 3, 4, 5)
    packets = host.receive().packets
    assert [p.slot > 0 for p in packets] == [True] * 5
    complete(host, packets[3], packets[1])
    rig.send(6)
    again = rig.host()
    assert again.to_replay == 3
    batch = again.receive(2)
    assert [(p.transaction_id, p.replayed) for p in batch.packets] == [(1, True), (3, True)]
    assert (batch.replayed, batch.size, batch.error) == (2, 0, None)
    assert [p.payload for p in batch.packets] == [b"payload!"] * 2
    assert taken(again) == [(5, True)]
    assert taken(again) == [(6, False)]
    assert [p.transaction_id for p in rig.guest.receive().packets] == [4, 2]


def test_it_may_happen_again_and_again(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1, 2, 3)
    host.receive()
    for turn in range(20):
        host = rig.host()
        packets = host.receive().packets
        assert [p.transaction_id for p in packets] == [1, 2 + turn, 3 + turn]
        complete(host, packets[1])
        rig.send(4 + turn)
        assert taken(host) == [(4 + turn, False)]
    assert len(rig.guest.receive().packets) == 20


def test_what_nobody_waits_for_is_not_recorded(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1, flags=0)
    rig.guest.send(COMP, b"", transaction_id=2, flags=1).check()
    rig.guest.send(PacketType.CANCEL_REQUEST, b"", transaction_id=3, flags=1).check()
    assert [p.slot for p in host.receive().packets] == [0, 0, 0]
    assert rig.host().to_replay == 0


def test_what_was_refused_is_refused_again(rig: Rig) -> None:
    """By the same rules: pages that are no memory, a type that there is not."""
    host = rig.host(resume=False)
    rig.guest.send_gpa_direct(b"direct!!", [GpaRange.of_pages([1])], transaction_id=1).check()
    rig.guest.send(15, b"", transaction_id=2, flags=1).check()
    names = [type(p.error).__name__ for p in host.receive().packets]
    assert names == ["PfnOutsideMemory", "PacketTypeUnexpected"]
    again = rig.host().receive().packets
    assert [type(p.error).__name__ for p in again] == names
    assert [p.replayed for p in again] == [True, True]


def test_external_data_is_translated_anew(rig: Rig) -> None:
    host = rig.host(resume=False)
    page = BASE_PFN + 64
    rig.guest.send_gpa_direct(
        b"direct!!", [GpaRange.of_pages([page, page + 5])], transaction_id=1
    ).check()
    host.receive().packets[0].external_data.close()  # type: ignore[union-attr]
    rig.ram.poke(page * PAGE_SIZE, b"here")
    (packet,) = rig.host().receive().packets
    data = packet.external_data
    assert data is not None
    assert data.read(0, 4) == b"here"
    assert [gpa // PAGE_SIZE for gpa, _ in data.segments] == [page, page + 5]
    data.close()


def test_a_packet_that_was_too_long_comes_as_one(rig: Rig) -> None:
    host = rig.host(resume=False)
    room = slot_bytes(SMALL) + 1024  # parts are whole pages
    rig.send(1, payload=bytes(room))
    rig.send(2)
    assert [p.error for p in host.receive().packets] == [None, None]
    again = rig.host()
    long, fits = again.receive().packets
    assert isinstance(long.error, errors.PacketTooLarge)
    assert (long.transaction_id, long.payload, long.error.value) == (1, b"", room)
    assert (fits.error, fits.payload) == (None, b"payload!")
    complete(again, long, fits)
    assert rig.host().to_replay == 0


def test_a_plan_does_what_fits_it_once_more(rig: Rig) -> None:
    disk = os.memfd_create("disk")
    os.write(disk, bytes(range(256)) * 4)
    plan = Plan(
        [
            Rule(
                operation=Operation.READ,
                fd=disk,
                file_size=1024,
                max_length=512,
                payload_length=8,
                mask=b"\xff",
                value=b"\x01",
                position=Number(2, 2),
                length=Number(4, 2),
            )
        ]
    )
    page = BASE_PFN + 70
    ranges = [GpaRange.of_pages([page])]
    host = rig.host(resume=False)
    rig.guest.send_gpa_direct(struct.pack("<HHHH", 1, 16, 32, 0), ranges, transaction_id=1).check()
    rig.guest.send_gpa_direct(struct.pack("<HHHH", 2, 16, 32, 0), ranges, transaction_id=2).check()
    rig.guest.send_gpa_direct(struct.pack("<HHHH", 1, 16, 32, 0), ranges, transaction_id=3).check()
    batch = host.receive(plan=plan)
    assert batch.done is not None  # and its completion never sent
    assert [p.transaction_id for p in batch.packets] == [2]
    for packet in batch.packets:
        assert packet.external_data is not None
        packet.external_data.close()
    again = rig.host()
    batch = again.receive(plan=plan)
    assert batch.done is not None
    assert (batch.done.completions, batch.replayed) == (1, 2)
    assert rig.ram.peek(page * PAGE_SIZE, 32) == bytes(range(16, 48))
    assert again.send_many(batch.done).entered == 1
    complete(again, *batch.packets)
    batch.packets[0].external_data.close()  # type: ignore[union-attr]
    assert again.receive(plan=plan).done is not None  # the third, out of the ring
    assert [p.transaction_id for p in rig.guest.receive().packets] == [1, 2]
    os.close(disk)


def test_without_a_slot_packets_stay_in_the_ring(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(*range(1, SLOTS + 3))
    batch = host.receive()
    assert (len(batch.packets), batch.no_slot, host.has_slot) == (SLOTS, True, False)
    batch_again = host.receive()
    assert (batch_again.packets, batch_again.no_slot) == ([], True)
    complete(host, batch.packets[2])
    assert host.has_slot
    assert taken(host) == [(SLOTS + 1, False)]
    expected = [i for i in range(1, SLOTS + 2) if i != 3]
    assert taken(rig.host()) == [(i, True) for i in expected]


def test_a_completion_that_does_not_fit_ends_its_packet(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    (packet,) = host.receive().packets
    sent = host.send_many([Outgoing(COMP, bytes(8192), 1, slot=packet.slot)])
    assert isinstance(sent.error, errors.PacketTooBig)
    assert rig.host().to_replay == 0


def test_a_slot_is_given_back_once(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(*range(1, SLOTS + 1))
    packets = host.receive().packets
    for slot in (packets[0].slot, packets[0].slot, SLOTS + 1, 1 << 31):
        host.send_many([Outgoing(COMP, b"", 1, slot=slot)])
    rig.send(20, 21)
    assert taken(host) == [(20, False)]


def test_an_opening_begins_with_nothing(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    host.receive()
    assert rig.host(resume=False).to_replay == 0


def test_a_part_that_was_never_used_has_nothing(rig: Rig) -> None:
    assert rig.host().to_replay == 0


def test_untouched_pages_take_no_memory() -> None:
    region = InflightRegion.create(64, 1024, PacketLimits())
    assert region.size > 64 * 1024 * MAX_SLOT_BYTES
    assert os.fstat(region.fd).st_blocks == 0
    region.close()


def test_clearing_gives_memory_back(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    host.receive()
    assert os.fstat(rig.region.fd).st_blocks
    rig.region.clear()
    assert os.fstat(rig.region.fd).st_blocks == 0


# -- between the steps: what the process had stored when it ended --------------------------------


def cursor(rig: Rig, which: int) -> tuple[int, int, int]:
    """Number, index, and which of the two it is."""
    (current,) = struct.unpack("<I", rig.peek(which + CURRENT, 4))
    number, index = struct.unpack("<QI", rig.peek(which + current * CURSOR_SIZE, 12))
    return number, index, current


def test_the_cursor_decides_not_the_header(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    host.receive()
    # as if it had been killed before the header's index was stored
    rig.guest.pages(True)[RING_READ_INDEX : RING_READ_INDEX + 4] = bytes(4)
    assert taken(rig.host()) == [(1, True)]
    assert rig.guest.state.tx_free == rig.guest.state.tx_size


def test_before_the_cursor_the_packet_is_in_the_ring(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    host.receive()
    rig.guest.pages(True)[RING_READ_INDEX : RING_READ_INDEX + 4] = bytes(4)
    rig.poke(RX + CURRENT, struct.pack("<I", 1 - cursor(rig, RX)[2]))
    again = rig.host()
    assert taken(again) == [(1, False)]
    assert taken(rig.host()) == [(1, True)]


def test_a_completion_before_its_cursor_has_not_been(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    complete(host, *host.receive().packets)
    rig.guest.pages(False)[RING_WRITE_INDEX : RING_WRITE_INDEX + 4] = bytes(4)
    rig.poke(TX + CURRENT, struct.pack("<I", 1 - cursor(rig, TX)[2]))
    rig.poke(FIRST_SLOT, struct.pack("<Q", 1))  # not yet freed
    again = rig.host()
    (packet,) = again.receive().packets
    assert (packet.transaction_id, packet.replayed) == (1, True)
    complete(again, packet)
    assert [p.transaction_id for p in rig.guest.receive().packets] == [1]


def test_a_completion_behind_its_cursor_is_published(rig: Rig) -> None:
    host = rig.host(resume=False)
    rig.send(1)
    complete(host, *host.receive().packets)
    rig.guest.pages(False)[RING_WRITE_INDEX : RING_WRITE_INDEX + 4] = bytes(4)
    rig.poke(FIRST_SLOT, struct.pack("<Q", 1))
    assert rig.host().to_replay == 0
    assert [p.transaction_id for p in rig.guest.receive().packets] == [1]


# -- what is refused -----------------------------------------------------------------------------

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


# -- the note ------------------------------------------------------------------------------------


def test_a_note_is_found_by_the_next(rig: Rig) -> None:
    host = rig.host(resume=False)
    assert host.note == b""
    host.note = b"first"
    host.note = bytes(range(256))
    assert rig.host().note == bytes(range(256))
    rig.hosts[-1].note = b""
    assert rig.host().note == b""


def test_an_opening_finds_no_note(rig: Rig) -> None:
    rig.host(resume=False).note = b"gone"
    assert rig.host(resume=False).note == b""


def test_a_note_that_was_being_written_is_none(rig: Rig) -> None:
    host = rig.host(resume=False)
    host.note = b"whole"
    rig.poke(NOTE, struct.pack("<I", 0))
    assert rig.host().note == b""
    rig.poke(NOTE, struct.pack("<I", 257))
    assert rig.host().note == b""


def test_a_note_has_an_end(rig: Rig) -> None:
    host = rig.host(resume=False)
    with pytest.raises(ValueError, match="256"):
        host.note = bytes(257)
    assert host.note == b""


def test_without_a_record_there_is_no_note(rig: Rig) -> None:
    host = Ring(rig.memory, scattered(4), 2)
    host.note = b"nowhere"
    assert host.note == b""
    host.close()
