# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory, rings and a guest's end of a channel, for the tests of the core rooms."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from uuid import UUID

from vhostvmbus.channel import Channel
from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.memory import GuestMemory
from vhostvmbus.ring import RawPacket, Ring, Role, Sent, signal, wait
from vhostvmbus.wire.errors import FrontEndError, RefuseOpen
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import PAGE_SIZE, Descriptor, align8, pack_descriptor

BASE = 0x100000
BASE_PFN = BASE // PAGE_SIZE
PAGES = 512
TEST_CLASS = UUID("a0a0a0a0-1111-2222-3333-444444444444")


class Ram:
    """A memfd with guest RAM at :data:`BASE`, mapped once for looking into it."""

    def __init__(self, pages: int = PAGES, base: int = BASE) -> None:
        self.base = base
        self.size = pages * PAGE_SIZE
        self.fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)

    def memory(self) -> GuestMemory:
        """A memory map with this RAM in it."""
        memory = GuestMemory()
        memory.add_region(self.base, self.size, self.fd)
        return memory

    def poke(self, gpa: int, data: bytes) -> None:
        """Writes as the guest would."""
        os.pwrite(self.fd, data, gpa - self.base)

    def peek(self, gpa: int, length: int) -> bytes:
        """Reads as the guest would."""
        return os.pread(self.fd, length, gpa - self.base)

    def close(self) -> None:
        os.close(self.fd)


def scattered(count: int, first: int = BASE_PFN) -> list[int]:
    """``count`` PFNs from ``first`` on, in no order that a run could be made of."""
    return [first + (i // 2 if i % 2 == 0 else count - 1 - i // 2) for i in range(count)]


def ring_pair(
    memory: GuestMemory, out_pages: int = 2, in_pages: int = 2, first: int = BASE_PFN
) -> tuple[Ring, Ring]:
    """The guest's and the host's end of a channel on the same pages."""
    pfns = scattered(out_pages + in_pages, first)
    guest = Ring(memory, pfns, out_pages, Role.GUEST, initialize=True)
    return guest, Ring(memory, pfns, out_pages, Role.HOST)


def word(ring: Ring, sending: bool, offset: int) -> int:
    """A field of the header of the ring that ``ring`` sends into, or of the other one."""
    return int.from_bytes(ring.pages(sending)[offset : offset + 4], "little")


def set_word(ring: Ring, sending: bool, offset: int, value: int) -> None:
    """Overwrites such a field, as a peer that lies would."""
    ring.pages(sending)[offset : offset + 4] = value.to_bytes(4, "little")


def raw_packet(
    kind: int,
    payload: bytes = b"",
    *,
    header: bytes = b"",
    transaction_id: int = 1,
    flags: int = 1,
    offset8: int | None = None,
    len8: int | None = None,
) -> bytes:
    """A packet with its trailer, as bytes; ``offset8`` and ``len8`` may lie."""
    offset = 16 + align8(len(header))
    length = offset + align8(len(payload))
    descriptor = Descriptor(
        kind,
        offset // 8 if offset8 is None else offset8,
        length // 8 if len8 is None else len8,
        flags,
        transaction_id,
    )
    body = (pack_descriptor(descriptor) + header).ljust(offset, b"\0")
    return body + payload.ljust(length - offset, b"\0") + bytes(8)


def repeat(function: Callable[[int], object], times: int) -> None:
    """Calls ``function`` with 0, 1, 2 ..."""
    for i in range(times):
        function(i)


class TestDevice(Device):
    """A device that notes its callbacks and does with packets what the test says."""

    __test__ = False
    class_id = TEST_CLASS
    name = "test"

    def __init__(self, on_packet: Callable[[Channel, object], None] | None = None) -> None:
        self.events: list[str] = []
        self.on_packet = on_packet

    def opened(self, channel: Channel) -> None:
        self.events.append("opened")

    def resumed(self, channel: Channel) -> None:
        self.events.append("resumed")

    def started(self, channel: Channel) -> None:
        self.events.append("started")

    def suspended(self, channel: Channel) -> None:
        self.events.append("suspended")

    def closed(self, channel: Channel) -> None:
        self.events.append("closed")

    def packet_received(self, channel, packet):  # type: ignore[no-untyped-def]
        if self.on_packet is not None:
            self.on_packet(channel, packet)
        else:
            packet.complete(packet.payload)


def status_of_open(host: DeviceHost, opening: Opening, kick: int, call: int) -> NtStatus:
    """Opens a channel, as a request of the front end would: the status that it gets."""
    try:
        host.open_channel(opening, kick, call)
    except (FrontEndError, RefuseOpen) as error:
        return error.status
    return NtStatus.SUCCESS


class GuestEnd:
    """A guest's end of channel 0 of a device, without a socket."""

    def __init__(
        self,
        device: Device,
        *,
        out_pages: int = 4,
        in_pages: int = 4,
        resume: bool = False,
        host: DeviceHost | None = None,
    ) -> None:
        self.ram = Ram()
        self.memory = self.ram.memory()
        self.host = host or DeviceHost(device)
        self.host.add_region(BASE, self.ram.size, self.ram.fd)
        self.pfns = scattered(out_pages + in_pages)
        self.data_pfn = BASE_PFN + 64
        self.out_pages = out_pages
        self.ring = Ring(self.memory, self.pfns, out_pages, Role.GUEST, initialize=True)
        self.host.gpadl_create(0, 1, [GpaRange.of_pages(self.pfns)])
        self.kick = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.status = self.open(resume)
        self.received: list[RawPacket] = []
        self.kicks = 0

    def open(self, resume: bool = False) -> NtStatus:
        opening = Opening(0, 1, self.out_pages, 0, 0x50003, b"user", resume)
        return status_of_open(self.host, opening, self.kick, self.call)

    @property
    def channel(self) -> Channel:
        return self.host.channels[0]

    def wake(self) -> None:
        self.kicks += 1
        signal(self.kick)

    def send(self, payload: bytes = b"", transaction_id: int = 1, flags: int = 1) -> None:
        """Sends inband; waits for space if it has to."""
        self._put(lambda: self.ring.send(6, payload, transaction_id=transaction_id, flags=flags))

    def send_direct(
        self, payload: bytes, ranges: Sequence[GpaRange], transaction_id: int = 1
    ) -> None:
        """Sends with external data."""
        self._put(lambda: self.ring.send_gpa_direct(payload, ranges, transaction_id=transaction_id))

    def _put(self, send: Callable[[], Sent]) -> None:
        deadline = time.monotonic() + 20
        while True:
            sent = send()
            if sent.signal:
                self.wake()
            if not sent.full:
                sent.check()
                return
            assert time.monotonic() < deadline, "the host makes no space"
            self.poll(0.05)

    def send_bytes(self, data: bytes) -> None:
        """Puts bytes into the out ring as they are, and kicks."""
        pages = self.ring.pages(True)
        size = len(pages) - PAGE_SIZE
        index = int.from_bytes(pages[0:4], "little")
        for position, byte in enumerate(data):
            pages[PAGE_SIZE + (index + position) % size] = byte
        pages[0:4] = ((index + len(data)) % size).to_bytes(4, "little")
        self.wake()

    def poll(self, timeout: float = 0.0) -> None:
        """Takes what is in the in ring, waiting for a signal if there is nothing."""
        batch = self.ring.receive()
        if not batch.packets and timeout:
            if not self.ring.unmask():
                wait([self.call], timeout)
            self.ring.mask()
            batch = self.ring.receive()
        assert batch.error is None, batch.error
        if batch.signal:
            self.wake()
        self.received.extend(batch.packets)

    def expect(self, count: int = 1, seconds: float = 10.0) -> list[RawPacket]:
        """The next ``count`` packets."""
        deadline = time.monotonic() + seconds
        while len(self.received) < count:
            assert time.monotonic() < deadline, f"{len(self.received)} of {count} packets"
            self.poll(0.2)
        taken, self.received = self.received[:count], self.received[count:]
        return taken

    def expect_nothing(self, seconds: float = 0.1) -> None:
        """Fails if a packet comes."""
        self.poll(seconds)
        assert not self.received

    def close(self) -> None:
        self.host.close()
        self.ring.close()
        self.memory.close()
        for fd in (self.kick, self.call):
            with suppress(OSError):
                os.close(fd)
        self.ram.close()

    def __enter__(self) -> "GuestEnd":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
