# SPDX-License-Identifier: GPL-2.0-or-later
"""The record of packets in flight: what is in it, and what comes out of it.

That nothing is lost or doubled whenever the process ends is inflight_check.c's business.
"""

import os
import struct

import pytest

from tests.support.inflight_rig import (
    COMP,
    CURRENT,
    CURSOR_SIZE,
    FIRST_SLOT,
    NOTE,
    RX,
    SLOTS,
    SMALL,
    TX,
    Rig,
    complete,
    taken,
)
from tests.support.ram import BASE_PFN, scattered
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
from vhostvmbus.ring.inflight import MAX_SLOT_BYTES, slot_bytes
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import PAGE_SIZE, RING_READ_INDEX, RING_WRITE_INDEX, PacketType

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


def test_what_ends_every_back_end_is_refused_in_the_end(rig: Rig) -> None:
    """It and what was in flight beside it; what comes afterwards is done as ever."""
    host = rig.host(resume=False)
    page = GpaRange.of_pages([BASE_PFN + 64])
    rig.guest.send_gpa_direct(b"poison!!", [page], transaction_id=1).check()
    host.receive()
    for _ in range(32):
        (packet,) = rig.host().receive().packets
        assert packet.error is None
        packet.external_data.close()  # type: ignore[union-attr]
    for _ in range(2):
        host = rig.host()
        (packet,) = host.receive().packets
        assert isinstance(packet.error, errors.PacketReplayedTooOften)
        assert packet.external_data is None
    complete(host, packet)
    rig.guest.send_gpa_direct(b"harmless", [page], transaction_id=2).check()
    (packet,) = host.receive().packets
    assert packet.external_data is not None
    packet.external_data.close()
    (packet,) = rig.host().receive().packets
    assert packet.error is None
    assert packet.external_data is not None
    packet.external_data.close()
    assert rig.memory.regions[0].users == 0


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
