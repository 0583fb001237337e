# SPDX-License-Identifier: GPL-2.0-or-later
"""KMCL's client endpoint: each parameter, flag and return of the functions that send."""

from __future__ import annotations

import contextlib
import random
import struct
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.bus.test_external import sha256
from tests.support.devices import Digest, Echo, Fill, Silent, pattern
from tests.support.soak import examples
from tests.support.waiting import eventually
from vhostvmbus.guest import (
    CompletionTimeout,
    GuestChannel,
    HostileChannel,
    RequestFailed,
    RingFullTimeout,
    SendRefused,
    SoftwareGuest,
)
from vhostvmbus.guest.external import ranges_of_chain
from vhostvmbus.wire.errors import PacketTooBig
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus

PAGE = 4096


# ---- VmbPacketSendWithExternalPfns ------------------------------------------------------


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 8), (7, 1), (2, 3), (1, None)])
def test_the_last_pfn_is_offset_plus_length_minus_one(offset: int, length: int | None) -> None:
    """PfnLength is inclusive: the host sees exactly these PFNs, in this order."""
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(8)
        transaction = channel.submit_with_external_pfns(
            b"", pfns, pfn_offset=offset, pfn_length=length
        )
        assert device.arrived.acquire(timeout=10)
        (packet,) = device.packets
        assert packet.external_data is not None
        (seen,) = packet.external_data.ranges
        count = 8 - offset if length is None else length
        assert list(seen.pfns) == pfns[offset : offset + count]
        assert seen.pfns[-1] == pfns[offset + count - 1]
        assert (seen.byte_offset, seen.byte_count) == (0, count * PAGE)
        packet.complete()
        transaction.wait()


@pytest.mark.parametrize("pages", [1, 16, 256])
def test_the_same_pages_written_and_read_back(pages: int) -> None:
    """1 PFN, 64 KiB, 1 MiB: what one device wrote, another one finds, and so does the guest."""
    with (
        SoftwareGuest.for_device(Fill()) as writer,
        writer.open_channel() as writes,
        SoftwareGuest.for_device(Digest(), ram=writer.ram) as reader,
        reader.open_channel() as reads,
    ):
        pfns = writer.ram.alloc_pages(pages)
        writes.send_with_external_pfns(struct.pack("<Q", pages), pfns)
        expected = pattern(pages, pages * PAGE)
        assert writer.ram.read(pfns) == expected
        assert reads.send_with_external_pfns(b"", pfns) == sha256(expected)
        assert reads.send_with_external_pfns(b"", pfns[::-1]) == sha256(
            b"".join(expected[at : at + PAGE] for at in range((pages - 1) * PAGE, -1, -PAGE))
        )


MANY_PAGES_SECONDS = 100.0
"""For 32 MiB of a pattern that the device makes in Python, on a machine that is busy."""


@pytest.mark.parametrize("ring_pages", [2, 3, 17, 65])
def test_the_largest_packet_of_a_ring(ring_pages: int) -> None:
    """Descriptor 16, count 8, range 8, PFNs, payload 8, trailer 8; 8 tell full from empty."""
    data = (ring_pages - 1) * PAGE
    most = (data - 8 - 16 - 8 - 8 - 8 - 8) // 8
    with (
        SoftwareGuest.for_device(Fill()) as guest,
        guest.open_channel(ring_pages=(ring_pages, 2)) as channel,
    ):
        own = guest.ram.alloc_pages(min(most, 1000))
        pfns = [own[i % len(own)] for i in range(most)]
        size = most * PAGE
        if size <= Fill.max_external_data:
            for _ in range(3):  # wherever it wraps
                channel.send_with_external_pfns(
                    struct.pack("<Q", ring_pages), pfns, timeout=MANY_PAGES_SECONDS
                )
            expected = pattern(ring_pages, size)
            last = expected[-len(own) * PAGE :] if most % len(own) == 0 else None
            if last is not None:
                assert guest.ram.read(own) == last
            assert guest.ram.read(pfns[-1:]) == expected[-PAGE:]
        else:
            channel.send_with_external_pfns(struct.pack("<Q", 0), pfns)
        with pytest.raises(PacketTooBig):
            channel.send_with_external_pfns(struct.pack("<Q", 0), [*pfns, own[0]])
        assert channel.in_flight == 0
        channel.send_with_external_pfns(struct.pack("<Q", 1), own[:1])
        assert guest.ram.read(own[:1]) == pattern(1, PAGE)


def test_the_same_page_written_twice() -> None:
    """The pages are one stretch of bytes: what comes last in it stays."""
    with SoftwareGuest.for_device(Fill()) as guest, guest.open_channel() as channel:
        one, two = guest.ram.alloc_pages(2)
        channel.send_with_external_pfns(struct.pack("<Q", 3), [one, two, one])
        expected = pattern(3, 3 * PAGE)
        assert guest.ram.read([one]) == expected[2 * PAGE :]
        assert guest.ram.read([two]) == expected[PAGE : 2 * PAGE]


def test_the_inline_buffer_is_copied_before_the_call_defers() -> None:
    """PAGED_BUFFER: changes while the call waits for space in the ring do not count either."""
    device = Silent()
    device.transaction_quota = 1
    with SoftwareGuest.for_device(device) as guest, guest.open_channel(ring_pages=(2, 2)) as c:
        sent = [c.submit(bytes(1000)) for _ in range(4)]
        buffer = bytearray(b"original" * 128)
        late: list[bytes] = []
        (pfn,) = guest.ram.alloc_pages(1)
        sender = threading.Thread(
            target=lambda: late.append(c.send_with_external_pfns(buffer, [pfn]))
        )
        sender.start()
        eventually(lambda: c.ring.state.tx_pending)  # it waits for space
        buffer[:] = b"tampered" * 128
        for number in range(5):
            assert device.arrived.acquire(timeout=10)
            device.packets[number].complete(b"done....")
        sender.join(10)
        assert late == [b"done...."]
        assert device.packets[4].payload == b"original" * 128
        for transaction in sent:
            transaction.wait()


def test_a_changed_buffer_after_the_return() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        buffer = bytearray(b"original")
        transaction = channel.submit_with_external_pfns(buffer, guest.ram.alloc_pages(1))
        buffer[:] = b"tampered"
        assert device.arrived.acquire(timeout=10)
        assert device.packets[0].payload == b"original"
        device.packets[0].complete()
        transaction.wait()


def test_completions_carry_the_transaction_id() -> None:
    """In any order, with pages; each wait returns its own."""
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        sent = [
            channel.submit_with_external_pfns(struct.pack("<Q", n), guest.ram.alloc_pages(2))
            for n in range(8)
        ]
        for _ in sent:
            assert device.arrived.acquire(timeout=10)
        for packet in random.Random(1).sample(device.packets, 8):
            packet.complete(struct.pack("<Q", packet.transaction_id))
        for number, transaction in enumerate(sent):
            (seen,) = struct.unpack("<Q", transaction.wait())
            assert seen == transaction.transaction_id
            assert device.packets[number].transaction_id == seen
        assert sorted(t.place for t in sent) == list(range(8))


def test_without_the_flag_on_the_wire_the_device_works_and_nothing_comes_back() -> None:
    device = Fill()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        liar = HostileChannel(channel.ring, channel.kick_fd)
        (pfn,) = guest.ram.alloc_pages(1)
        liar.put_gpa_direct([GpaRange(PAGE, 0, [pfn])], struct.pack("<Q", 9), flags=0)
        eventually(lambda: guest.ram.read([pfn]) == pattern(9, PAGE))
        assert guest.host is not None
        (stats,) = guest.host.stats()["channels"]
        eventually(lambda: guest.host.channels[0].outstanding == 0)  # type: ignore[union-attr]
        assert stats["completions_sent"] == 0
        assert stats["errors"] == {}
        with pytest.raises(CompletionTimeout):
            channel._wait_for(channel.submit(b""), 0)
        assert channel.stray_completions == []


# ---- VmbPacketSendWithExternalMdl -------------------------------------------------------


def chain_of(guest: SoftwareGuest) -> tuple[list[GpaRange], bytes]:
    """Three buffers with odd offsets and lengths, and their bytes."""
    pfns = guest.ram.alloc_pages(7)
    guest.ram.write(pfns, random.Random(7).randbytes(7 * PAGE))
    chain = [
        GpaRange(5000, 3000, pfns[0:2]),
        GpaRange(1, 4095, pfns[2:3]),
        GpaRange(3 * PAGE + 50, 4000, pfns[3:7]),
    ]
    return chain, b"".join(guest.ram.read(c.pfns, c.byte_offset, c.byte_count) for c in chain)


def test_any_part_of_a_chain() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        chain, content = chain_of(guest)
        assert channel.send_with_external_data(b"", chain) == sha256(content)

        @settings(max_examples=examples(150), deadline=None)
        @given(st.integers(0, len(content) - 1), st.integers(0, len(content)))
        def check(offset: int, length: int) -> None:
            if offset + length > len(content):
                with pytest.raises(SendRefused) as caught:
                    channel.send_with_external_data(b"", chain, offset=offset, length=length)
                assert caught.value.status is NtStatus.INVALID_PARAMETER
                return
            end = offset + length if length else len(content)
            answer = channel.send_with_external_data(b"", chain, offset=offset, length=length)
            assert answer == sha256(content[offset:end])

        check()


def test_a_forced_length_reaches_to_the_end_of_the_page() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(2)
        content = random.Random(8).randbytes(2 * PAGE)
        guest.ram.write(pfns, content)
        short = GpaRange(PAGE + 10, 100, pfns)
        behind = GpaRange(PAGE, 0, pfns[:1])

        def send(length: int, offset: int = 0, force: bool = True) -> bytes:
            return channel.send_with_external_data(
                b"", [short, behind], offset=offset, length=length, force_length=force
            )

        room = 2 * PAGE - 100
        assert send(PAGE + 11) == sha256(content[100 : 100 + PAGE + 11])
        assert send(room) == sha256(content[100:])
        assert send(room - 50, 50) == sha256(content[150:])
        # only the first buffer counts, and a length of 0 is what it says itself
        assert send(0) == sha256(content[100 : 110 + PAGE])
        for length, offset in ((room + 1, 0), (room, 1), (0, PAGE + 10)):
            with pytest.raises(SendRefused) as caught:
                send(length, offset)
            assert caught.value.status is NtStatus.INVALID_PARAMETER
        # without force, what lies behind the first buffer comes from the second one
        assert send(PAGE + 11, force=False) == sha256(content[100 : 110 + PAGE] + content[:1])


REFUSED_CHAINS: dict[str, tuple[list[GpaRange], dict[str, object]]] = {
    "no completion wanted": ([GpaRange(8, 0, [1])], {"wait_for_completion": False}),
    "no buffer": ([], {}),
    "no byte": ([GpaRange(0, 0, [1])], {}),
    "no page": ([GpaRange(8, 0, [])], {}),
    "a page too many": ([GpaRange(8, 0, [1, 2])], {}),
    "negative offset": ([GpaRange(8, 0, [1])], {"offset": -1}),
    "negative length": ([GpaRange(8, 0, [1])], {"length": -1}),
    "offset at the end": ([GpaRange(8, 0, [1])], {"offset": 8}),
    "longer than the chain": ([GpaRange(8, 0, [1])], {"length": 9}),
    "a negative PFN": ([GpaRange(8, 0, [-1])], {}),
    "a PFN of 65 bits": ([GpaRange(8, 0, [1 << 64])], {}),
    "a negative byte offset": ([GpaRange(8, -8, [1])], {}),
}


@pytest.mark.parametrize("name", REFUSED_CHAINS)
def test_refused_chains(name: str) -> None:
    chain, arguments = REFUSED_CHAINS[name]
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        with pytest.raises(SendRefused) as caught:
            channel.send_with_external_data(b"", chain, **arguments)  # type: ignore[arg-type]
        assert caught.value.status is NtStatus.INVALID_PARAMETER
        assert channel.in_flight == 0
        assert channel.ring.state.tx_free == channel.ring.state.tx_size


@given(
    st.lists(st.tuples(st.integers(1, 20000), st.integers(0, 4095)), min_size=1, max_size=5),
    st.data(),
)
def test_a_part_of_a_chain_is_that_part(
    buffers: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Byte by byte, against a plain list of addresses."""
    chain, addresses = [], []
    for number, (count, offset) in enumerate(buffers):
        pfns = [1000 * number + i * 7 for i in range((offset + count + PAGE - 1) // PAGE)]
        chain.append(GpaRange(count, offset, pfns))
        addresses += [pfns[b // PAGE] * PAGE + b % PAGE for b in range(offset, offset + count)]
    start = data.draw(st.integers(0, len(addresses) - 1))
    length = data.draw(st.integers(1, len(addresses) - start))
    got = []
    for item in ranges_of_chain(chain, start, length):
        first = item.byte_offset
        assert first < PAGE
        assert (first + item.byte_count + PAGE - 1) // PAGE == len(item.pfns)
        got += [
            item.pfns[b // PAGE] * PAGE + b % PAGE for b in range(first, first + item.byte_count)
        ]
    assert got == addresses[start : start + length]


# ---- VmbChannelSendSynchronousRequest ---------------------------------------------------


def failing(channel: GuestChannel, **arguments: object) -> NtStatus:
    with pytest.raises(RequestFailed) as caught:
        channel.request(b"12345678", **arguments)  # type: ignore[arg-type]
    return caught.value.status


def test_a_request_and_its_completion_buffer() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:
        assert channel.request(b"question") == b"question"
        assert channel.request(b"question", completion_size=8) == b"question"
        assert channel.request(b"question", completion_size=64) == b"question"
        assert channel.request(b"question", wait_for_completion=False) == b""
        assert channel.request(b"", completion_size=0) == b""
        for size in (1, 7, 12, -8):
            assert failing(channel, completion_size=size) is NtStatus.INVALID_PARAMETER
        assert failing(channel, completion_size=0) is NtStatus.BUFFER_TOO_SMALL
        assert failing(channel, timeout=0) is NtStatus.INVALID_PARAMETER


def fill(channel: GuestChannel, size: int) -> None:
    """Send until the ring is full."""
    with contextlib.suppress(RingFullTimeout):
        while True:
            channel.send(bytes(size), wait=False, timeout=0)


def test_a_request_without_time_does_not_wait_for_space() -> None:
    device = Silent()
    device.transaction_quota = 1
    with SoftwareGuest.for_device(device) as guest, guest.open_channel(ring_pages=(2, 2)) as c:
        assert c.request(b"fits....", timeout=0, wait_for_completion=False) == b""
        fill(c, 1000)
        fill(c, 8)
        started = time.monotonic()
        status = failing(c, timeout=0, wait_for_completion=False)
        assert status is NtStatus.BUFFER_OVERFLOW
        assert time.monotonic() - started < 8


def test_a_request_that_takes_too_long_is_cancelled_or_loses_its_channel() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest:
        channel = guest.enable()
        assert failing(channel, timeout=0.05) is NtStatus.IO_TIMEOUT
        cancel = threading.Event()
        statuses: list[NtStatus] = []
        asking = threading.Thread(
            target=lambda: statuses.append(failing(channel, cancel=cancel, timeout=30))
        )
        asking.start()
        for _ in range(2):
            assert device.arrived.acquire(timeout=10)
        cancel.set()
        asking.join(10)
        assert statuses == [NtStatus.CANCELLED]

        asking = threading.Thread(target=lambda: statuses.append(failing(channel, timeout=30)))
        asking.start()
        assert device.arrived.acquire(timeout=10)
        guest.disable()
        asking.join(10)
        assert statuses == [NtStatus.CANCELLED, NtStatus.DEVICE_REMOVED]
        assert failing(channel) is NtStatus.DEVICE_REMOVED
