# SPDX-License-Identifier: GPL-2.0-or-later
"""A ring whose packets in flight are recorded, and back ends that follow each other on it."""

import os

from tests.support.ram import Ram, scattered
from tests.support.rings import ring_pair
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import (
    InflightRegion,
    Outgoing,
    PacketLimits,
    Ring,
)
from vhostvmbus.wire.vmbus import PAGE_SIZE, PacketType

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
        """Makes the next host; the one before does nothing any more, as if it had been killed."""
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


def taken(ring: Ring, count: int = 64) -> list[tuple[int, bool]]:
    return [(p.transaction_id, p.replayed) for p in ring.receive(count).packets]


def complete(ring: Ring, *packets: object) -> None:
    outgoing = [Outgoing(COMP, b"", p.transaction_id, slot=p.slot) for p in packets]  # type: ignore[attr-defined]
    assert ring.send_many(outgoing).entered == len(packets)
