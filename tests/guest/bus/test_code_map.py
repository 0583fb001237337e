# SPDX-License-Identifier: GPL-2.0-or-later
"""Translated code: a page whose bit is set is invalidated before the completion can be seen."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Sequence

import pytest

from tests.support.devices import Backwards, Digest, Fill, GatheringEcho, Touch
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.guest import GuestChannel, SoftwareGuest
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import FeatureMissing, RequestRefused
from vhostvmbus.wire.ntstatus import NtStatus

Ranges = Sequence[tuple[int, int]]


def pages_of(invalidations: Sequence[Ranges]) -> set[int]:
    """The PFNs that these invalidations cover."""
    return {
        pfn
        for ranges in invalidations
        for start, size in ranges
        for pfn in range(start >> 12, (start + size + 4095) >> 12)
    }


def touch(channel: GuestChannel, pfns: Sequence[int], offset: int, length: int) -> bytes:
    return channel.send_with_external_pfns(struct.pack("<II", offset, length), pfns)


class Watch:
    """Looks, while an invalidation is being served, whether the completion can be seen."""

    def __init__(self, delay: float = 0.1) -> None:
        self.channel: GuestChannel | None = None
        self.delay = delay
        self.bytes_in_ring: list[int] = []
        self.completions_seen: list[int] = []

    def __call__(self, ranges: Ranges) -> None:
        assert self.channel is not None
        end = time.monotonic() + self.delay
        while time.monotonic() < end:
            self.bytes_in_ring.append(self.channel.ring.state.rx_available)
            time.sleep(0.005)


def test_invalidation_comes_before_the_completion() -> None:
    watch = Watch()
    with (
        SoftwareGuest.for_device(Touch(), code_map=True, on_invalidate=watch) as guest,
        guest.open_channel() as channel,
    ):
        watch.channel = channel
        pfns = guest.ram.alloc_pages(4)
        assert guest.code_map is not None
        guest.code_map.mark(pfns[2])
        transaction = channel.submit_with_external_pfns(struct.pack("<II", 0, 16384), pfns)
        deadline = time.monotonic() + 10
        while not guest.invalidations and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not transaction.done
        assert transaction.wait() == b"written."
        assert pages_of(guest.invalidations) == {pfns[2]}
        # The data was there, the completion was not, for as long as the front end took.
        assert len(watch.bytes_in_ring) > 5
        assert set(watch.bytes_in_ring) == {0}


def test_the_new_bytes_are_there_when_the_invalidation_comes() -> None:
    seen: list[bytes] = []
    pfns: list[int] = []

    def look(ranges: Ranges) -> None:
        seen.append(bytes(guest.ram.page(pfns[0])[:8]))

    with (
        SoftwareGuest.for_device(Touch(), code_map=True, on_invalidate=look) as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(1)
        assert guest.code_map is not None
        guest.code_map.mark(pfns[0])
        touch(channel, pfns, 0, 8)
    assert seen == [b"\x90" * 8]


def test_nothing_is_invalidated_when_no_bit_is_set() -> None:
    with (
        SoftwareGuest.for_device(Fill(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(64)
        neighbours = {pfn + step for pfn in pfns for step in (-1, 1)} - set(pfns)
        assert guest.code_map is not None
        for pfn in neighbours:
            if any(
                r.guest_phys_addr <= pfn << 12 < r.guest_phys_addr + r.size
                for r in guest.ram.regions
            ):
                guest.code_map.mark(pfn)
        for number in range(20):
            channel.send_with_external_pfns(struct.pack("<Q", number), pfns)
        assert guest.invalidations == []


@pytest.mark.parametrize(
    ("offset", "length", "touched"),
    [
        (0, 1, [0]),
        (4095, 1, [0]),
        (4095, 2, [0, 1]),
        (4096, 4096, [1]),
        (4096, 4097, [1, 2]),
        (8191, 4098, [1, 2, 3]),
        (0, 0, []),
    ],
)
def test_only_pages_that_were_written(offset: int, length: int, touched: list[int]) -> None:
    with (
        SoftwareGuest.for_device(Touch(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(4)
        assert guest.code_map is not None
        for pfn in pfns:
            guest.code_map.mark(pfn)
        touch(channel, pfns, offset, length)
        assert pages_of(guest.invalidations) == {pfns[page] for page in touched}


def test_reading_invalidates_nothing() -> None:
    with (
        SoftwareGuest.for_device(Digest(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(4)
        assert guest.code_map is not None
        for pfn in pfns:
            guest.code_map.mark(pfn)
        channel.send_with_external_pfns(b"", pfns)
        assert guest.invalidations == []


def test_a_bit_that_was_cleared_again() -> None:
    with (
        SoftwareGuest.for_device(Touch(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(1)
        assert guest.code_map is not None
        for marked in (True, False, True):
            guest.code_map.mark(pfns[0], marked)
            assert guest.code_map.is_marked(pfns[0]) == marked
            touch(channel, pfns, 0, 4096)
        assert len(guest.invalidations) == 2


def test_a_front_end_that_cannot_tell() -> None:
    with (
        SoftwareGuest.for_device(Touch(), code_map="unknown") as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(4)
        touch(channel, pfns, 0, 16384)
        assert pages_of(guest.invalidations) == set(pfns)


def test_a_front_end_without_a_code_map() -> None:
    with SoftwareGuest.for_device(Touch()) as guest, guest.open_channel() as channel:
        assert guest.code_map is None
        touch(channel, guest.ram.alloc_pages(4), 0, 16384)
        assert guest.invalidations == []
        with pytest.raises(FeatureMissing):
            guest.share_code_map()


def test_a_map_that_is_longer_than_its_file_is_refused() -> None:
    """And the one of before is looked into still."""
    with (
        SoftwareGuest.for_device(Touch(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        assert guest.code_map is not None
        size = os.fstat(guest.code_map.fd).st_size
        regions = guest.code_map.message().regions
        with pytest.raises(RequestRefused) as caught:
            guest.front_end.request(m.SetCodeMap(size + 1, regions), [guest.code_map.fd])
        assert caught.value.status == NtStatus.INVALID_PARAMETER
        pfns = guest.ram.alloc_pages(2)
        guest.code_map.mark(pfns[1])
        touch(channel, pfns, 0, 8192)
        assert pages_of(guest.invalidations) == {pfns[1]}


def test_more_ranges_than_one_message_holds() -> None:
    with (
        SoftwareGuest.for_device(Fill(), code_map=True) as guest,
        guest.open_channel(ring_pages=(17, 17)) as channel,
    ):
        pool = guest.ram.alloc_pages(1000, scattered=False)[::2]
        assert guest.code_map is not None
        for pfn in pool:
            guest.code_map.mark(pfn)
        channel.send_with_external_pfns(struct.pack("<Q", 1), pool)
        assert pages_of(guest.invalidations) == set(pool)
        sizes = [len(ranges) for ranges in guest.invalidations]
        assert sizes == [200, 200, 100]


class ManyAtOnce(Fill):
    """Fills, and publishes completions together."""

    gather_completions = True

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        super().packet_received(channel, packet)


def test_completions_published_together() -> None:
    """None of a batch's completions may be seen before all of its invalidations."""
    pending: set[int] = set()
    early: list[int] = []

    def on_invalidate(ranges: Ranges) -> None:
        time.sleep(0.001)
        pending.difference_update(pages_of([ranges]))

    with (
        SoftwareGuest.for_device(ManyAtOnce(), code_map=True, on_invalidate=on_invalidate) as guest,
        guest.open_channel() as channel,
    ):
        assert guest.code_map is not None
        pfns = guest.ram.alloc_pages(64)
        for pfn in pfns:
            guest.code_map.mark(pfn)
        for turn in range(5):
            pending.update(pfns)
            transactions = [
                (pfn, channel.submit_with_external_pfns(struct.pack("<Q", turn), [pfn]))
                for pfn in pfns
            ]
            for pfn, transaction in transactions:
                transaction.wait()
                if pfn in pending:
                    early.append(pfn)
    assert early == []


def test_completion_from_another_thread() -> None:
    class Elsewhere(Backwards):
        def packet_received(self, channel: Channel, packet: Packet) -> None:
            assert packet.external_data is not None
            packet.external_data.fill(0xCC)
            super().packet_received(channel, packet)

    with (
        SoftwareGuest.for_device(Elsewhere(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        assert guest.code_map is not None
        pfns = guest.ram.alloc_pages(8)
        for pfn in pfns:
            guest.code_map.mark(pfn)
        transactions = [
            channel.submit_with_external_pfns(struct.pack("<Q", 7 - i), [pfn])
            for i, pfn in enumerate(pfns)
        ]
        for transaction in transactions:
            transaction.wait()
        assert pages_of(guest.invalidations) == set(pfns)
        assert all(bytes(guest.ram.page(pfn)) == b"\xcc" * 4096 for pfn in pfns)


def test_close_while_an_invalidation_waits() -> None:
    """The close is answered although its packet needs the front end first."""
    entered, release = threading.Event(), threading.Event()

    def slow(ranges: Ranges) -> None:
        entered.set()
        assert release.wait(10)

    with SoftwareGuest.for_device(Touch(), code_map=True, on_invalidate=slow) as guest:
        channel = guest.enable()
        assert guest.code_map is not None
        pfns = guest.ram.alloc_pages(1)
        guest.code_map.mark(pfns[0])
        channel.submit_with_external_pfns(struct.pack("<II", 0, 4096), pfns)
        assert entered.wait(10)
        closer = threading.Thread(target=guest.front_end.request, args=(m.Close(0),))
        closer.start()
        closer.join(0.2)
        assert closer.is_alive()
        release.set()
        closer.join(10)
        assert not closer.is_alive()
        guest.reset()


def test_front_end_that_does_not_answer_never_sees_the_completion() -> None:
    release = threading.Event()
    with SoftwareGuest.for_device(
        Touch(),
        code_map=True,
        on_invalidate=lambda _: (release.wait(10), None)[1],
        invalidate_timeout=0.2,
    ) as guest:
        channel = guest.enable()
        assert guest.code_map is not None
        pfns = guest.ram.alloc_pages(1)
        guest.code_map.mark(pfns[0])
        channel.submit_with_external_pfns(struct.pack("<II", 0, 4096), pfns)
        assert guest.front_end.receive_raw() == b""  # the back end gives up and leaves
        assert channel.ring.state.rx_available == 0
        release.set()


def test_map_is_sent_again_after_memory_was_added() -> None:
    with (
        SoftwareGuest.for_device(Touch(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        assert guest.code_map is not None
        (old,) = guest.ram.alloc_pages(1)
        guest.code_map.mark(old)
        region = guest.ram.add(0x2_0000_0000, 1 << 20)
        guest.add_memory(region)
        guest.share_code_map()
        new = region.guest_phys_addr >> 12
        guest.code_map.mark(new)
        touch(channel, [old, new, new + 1], 0, 3 * 4096)
        assert pages_of(guest.invalidations) == {old, new}


def test_memory_that_the_map_does_not_cover_counts_as_translated() -> None:
    """Between ADD_MEM_REG and the next map, nobody can tell."""
    with (
        SoftwareGuest.for_device(Touch(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        region = guest.ram.add(0x2_0000_0000, 1 << 20)
        guest.add_memory(region)
        new = region.guest_phys_addr >> 12
        touch(channel, [new], 0, 4096)
        assert pages_of(guest.invalidations) == {new}


def test_in_band_traffic_is_exempt() -> None:
    """Ring pages are exempt."""
    with (
        SoftwareGuest.for_device(GatheringEcho(), code_map=True) as guest,
        guest.open_channel() as channel,
    ):
        assert guest.code_map is not None
        for pfn in channel.ring.pfns:
            guest.code_map.mark(pfn)
        for _ in range(100):
            channel.send(b"12345678")
        assert guest.invalidations == []
