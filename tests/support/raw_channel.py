# SPDX-License-Identifier: GPL-2.0-or-later
"""A channel of the software guest, packet by packet: for tests of what the host makes of each.

There is no socket: a test reaches the device's host and its channel as objects, and may do behind
the front end's back what a front end would have asked for.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tests.support.ram import BASE, PAGES
from vhostvmbus.channel import Channel
from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.guest import (
    GuestChannel,
    GuestRam,
    HostileChannel,
    NtStatus,
    RequestRefused,
    SoftwareGuest,
)
from vhostvmbus.guest.software_guest import VERSION
from vhostvmbus.ring import RawPacket, Sent, signal, wait
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import PAGE_SIZE


class RawChannel:
    """The guest's end of channel 0.

    Transaction ids are the test's, and so are the packets that come: nobody matches them.
    """

    def __init__(self, guest: SoftwareGuest, opened: GuestChannel, opening: Opening) -> None:
        assert guest.host is not None
        self.guest = guest
        self.ram = guest.ram
        self.host: DeviceHost = guest.host
        self.ring = opened.ring
        self.opening = opening
        self.received: list[RawPacket] = []
        self.kicks = 0
        self._eventfds = (opened.kick_fd, opened.call_fd)

    @property
    def channel(self) -> Channel:
        """The host's end."""
        return self.host.channels[0]

    @property
    def pfns(self) -> Sequence[int]:
        """The ring's pages."""
        return self.ring.pfns

    def open(self, opening: Opening | None = None) -> NtStatus:
        """Opens a channel (None: this one, once more) with this one's eventfds; the answer."""
        try:
            self.guest.front_end.request(m.Open(opening or self.opening), self._eventfds)
        except RequestRefused as error:
            return NtStatus(error.status)
        return NtStatus.SUCCESS

    def resume(self) -> NtStatus:
        """Opens the channel as after a new connection: its ring stays what it is."""
        return self.open(replace(self.opening, resumed=True))

    def wake(self) -> None:
        """Signals the host."""
        self.kicks += 1
        signal(self._eventfds[0])

    def wait_signalled(self, timeout: float) -> bool:
        """Waits for the host's signal, and tells whether it came."""
        return bool(wait([self._eventfds[1]], timeout))

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
        """Puts bytes into the out ring as they are, and signals."""
        HostileChannel(self.ring, self._eventfds[0]).out_ring.put(data)
        self.wake()

    def poll(self, timeout: float = 0.0) -> None:
        """Takes what is in the in ring, waiting for a signal if there is nothing."""
        batch = self.ring.receive()
        if not batch.packets and timeout:
            if not self.ring.unmask():
                wait([self._eventfds[1]], timeout)
            self.ring.mask()
            batch = self.ring.receive()
        assert batch.error is None, batch.error
        if batch.signal:
            self.wake()
        self.received.extend(batch.packets)

    def expect(self, count: int = 1, seconds: float = 10.0) -> list[RawPacket]:
        """Returns the next ``count`` packets."""
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


@contextlib.contextmanager
def raw_channel(
    device: Device | DeviceHost, *, out_pages: int = 4, in_pages: int = 4
) -> Iterator[RawChannel]:
    """Connects a guest with :data:`PAGES` pages at :data:`BASE` to ``device`` and opens channel 0.

    The ring has the first pages, in no order; those behind are the test's, by their numbers.
    Nothing is kept in flight, and there is no code map, unless the test gives the host one.
    """
    with contextlib.closing(GuestRam([(BASE, PAGES * PAGE_SIZE)])) as ram:
        ring = ram.alloc_pages(out_pages + in_pages, scattered=False)
        ram.alloc_pages(ram.free_page_count)
        ram.free_pages(ring)
        with SoftwareGuest.direct(device, ram=ram, inflight=False) as guest:
            opened = guest.enable(ring_pages=(out_pages, in_pages), user_data=b"user")
            (gpadl_id,) = guest.gpadls
            opening = Opening(0, gpadl_id, out_pages, 0, VERSION, b"user")
            yield RawChannel(guest, opened, opening)


def repeat(function: Callable[[int], object], times: int) -> None:
    """Calls ``function`` with 0, 1, 2 ..."""
    for i in range(times):
        function(i)
