# SPDX-License-Identifier: GPL-2.0-or-later
"""A peer that lies in its ring headers, takes its memory away, or sends more than is allowed."""

import os

import pytest

from tests.support.ram import BASE_PFN, Ram, scattered
from tests.support.rings import ring_pair, set_word, word
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import PacketLimits, Ring, Role
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import RING_READ_INDEX, RING_WRITE_INDEX, PacketType

INBAND, COMP = PacketType.DATA_INBAND, PacketType.COMP


@pytest.mark.parametrize("index", [1, 4, 12, 4096, 4104, 0xFFFFFFFF])
def test_a_write_index_that_is_none(memory: GuestMemory, index: int) -> None:
    guest, host = ring_pair(memory)
    set_word(guest, True, RING_WRITE_INDEX, index)
    batch = host.receive()
    assert batch.packets == []
    assert isinstance(batch.error, errors.RingIndexInvalid)
    assert (batch.error.field, batch.error.value) == ("write_index", index)
    assert host.unmask()  # it has to be looked at


@pytest.mark.parametrize("index", [1, 4, 4096, 0xFFFFFFF8])
def test_a_read_index_that_is_none(memory: GuestMemory, index: int) -> None:
    guest, host = ring_pair(memory)
    set_word(guest, False, RING_READ_INDEX, index)
    sent = host.send(COMP)
    assert sent[:3] == (0, False, False)
    assert isinstance(sent.error, errors.RingIndexInvalid)
    assert (sent.error.field, sent.error.value) == ("read_index", index)


def test_our_own_indices_are_not_believed_back(memory: GuestMemory) -> None:
    guest, host = ring_pair(memory)
    guest.send(INBAND, b"first").check()
    set_word(guest, True, RING_READ_INDEX, 2048)
    assert host.receive().packets[0].payload.startswith(b"first")
    assert word(guest, True, RING_READ_INDEX) == 32
    host.send(COMP, transaction_id=1).check()
    set_word(guest, False, RING_WRITE_INDEX, 2048)
    host.send(COMP, transaction_id=2).check()
    assert word(guest, False, RING_WRITE_INDEX) == 48


def test_lost_pages_are_named() -> None:
    ram = Ram()
    memory = ram.memory()
    guest, host = ring_pair(memory)
    os.ftruncate(ram.fd, 0)
    assert isinstance(host.receive().error, errors.RingMemoryLost)
    with pytest.raises((errors.RingMemoryLost, errors.RingIndexInvalid)):
        host.send(COMP).check().check()
    assert host.lost
    assert host.unmask()
    with pytest.raises(errors.RingInvalid):
        Ring(memory, scattered(4), 2)
    guest.close()
    host.close()
    memory.close()
    ram.close()


def test_limits(memory: GuestMemory) -> None:
    pfns = scattered(16)
    guest = Ring(memory, pfns, 8, Role.GUEST, initialize=True)
    host = Ring(memory, pfns, 8, limits=PacketLimits(64, 8192, 2))
    page = GpaRange.of_pages([BASE_PFN])
    guest.send(INBAND, bytes(64), transaction_id=1).check()
    guest.send(INBAND, bytes(65), transaction_id=2).check()
    guest.send_gpa_direct(b"", [page, page], transaction_id=3).check()
    guest.send_gpa_direct(b"", [page, page, page], transaction_id=4).check()
    guest.send_gpa_direct(b"", [GpaRange.of_pages([BASE_PFN] * 3)], transaction_id=5).check()
    packets = host.receive().packets
    assert [type(p.error) for p in packets] == [
        type(None),
        errors.PacketTooLarge,
        type(None),
        errors.GpaRangeCountInvalid,
        errors.GpaRangeTooLong,
    ]
    assert packets[1].error is not None
    assert (packets[1].error.field, packets[1].error.value) == ("payload_length", 72)
    assert packets[1].error.offset == packets[1].ring_offset + 4
