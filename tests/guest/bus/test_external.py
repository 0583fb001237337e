# SPDX-License-Identifier: GPL-2.0-or-later
"""External data: VmbPacketSendWithExternalPfns against devices that read and write the pages."""

from __future__ import annotations

import contextlib
import hashlib
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.devices import Digest, Fill, GpadlDigest, Silent, pattern
from tests.support.soak import examples
from vhostvmbus.guest import GuestRam, SendRefused, SoftwareGuest
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.errors import PacketTooBig
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus

KIB = 1024
SIZES = [4 * KIB, 8 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB]


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scattered", [False, True])
def test_device_reads(size: int, scattered: bool) -> None:
    data = random.Random(size).randbytes(size)
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(size // 4096, scattered=scattered)
        guest.ram.write(pfns, data)
        assert channel.send_with_external_pfns(b"", pfns) == sha256(data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scattered", [False, True])
def test_device_writes(size: int, scattered: bool) -> None:
    """Every byte arrives; not one byte of the page before or behind is touched."""
    with SoftwareGuest.for_device(Fill()) as guest, guest.open_channel() as channel:
        pages = size // 4096
        pfns = guest.ram.alloc_pages(pages + 2, scattered=scattered)
        guest.ram.write(pfns, b"\xee" * (size + 8192))
        channel.send_with_external_pfns(struct.pack("<Q", size), pfns[1:-1])
        assert guest.ram.read(pfns[1:-1]) == pattern(size, size)
        assert guest.ram.read(pfns[:1]) == guest.ram.read(pfns[-1:]) == b"\xee" * 4096


def test_any_offset_and_count() -> None:
    with (
        SoftwareGuest.for_device(Digest()) as reader,
        SoftwareGuest.for_device(Fill()) as writer,
        reader.open_channel() as reads,
        writer.open_channel() as writes,
    ):
        pool_r, pool_w = reader.ram.alloc_pages(64), writer.ram.alloc_pages(64)
        data = random.Random(1).randbytes(64 * 4096)
        reader.ram.write(pool_r, data)

        @settings(max_examples=examples(100), deadline=None)
        @given(st.data())
        def check(draw: st.DataObject) -> None:
            count = draw.draw(st.integers(1, 64))
            first = draw.draw(st.integers(0, 64 - count))
            offset = draw.draw(st.integers(0, 4095))
            least = max(1, (count - 1) * 4096 - offset + 1)
            size = draw.draw(st.integers(least, count * 4096 - offset))
            expected = data[first * 4096 + offset :][:size]
            answer = reads.send_with_external_pfns(
                b"",
                pool_r,
                pfn_offset=first,
                pfn_length=count,
                byte_offset=offset,
                byte_count=size,
            )
            assert answer == sha256(expected)

            pfns = pool_w[first : first + count]
            writer.ram.write(pfns, b"\x55" * (count * 4096))
            seed = draw.draw(st.integers(0, 1 << 60))
            writes.send_with_external_pfns(
                struct.pack("<Q", seed), pfns, byte_offset=offset, byte_count=size
            )
            after = guest_bytes = writer.ram.read(pfns)
            assert after[offset : offset + size] == pattern(seed, size)
            assert set(guest_bytes[:offset] + guest_bytes[offset + size :]) <= {0x55}

        check()


def test_offset_defaults_to_the_end_of_the_last_page() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(3)
        data = random.Random(2).randbytes(3 * 4096)
        guest.ram.write(pfns, data)
        assert channel.send_with_external_pfns(b"", pfns, byte_offset=100) == sha256(data[100:])


def test_the_same_page_twice() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        (pfn,) = guest.ram.alloc_pages(1)
        guest.ram.write([pfn], b"ab" * 2048)
        answer = channel.send_with_external_pfns(b"", [pfn] * 5)
        assert answer == sha256(b"ab" * 2048 * 5)


def test_pages_on_both_sides_of_a_hole() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        low, high = guest.ram.regions
        pfns = [
            (low.guest_phys_addr + low.size) // 4096 - 1,
            high.guest_phys_addr // 4096,
            (high.guest_phys_addr + high.size) // 4096 - 1,
        ]
        data = random.Random(3).randbytes(3 * 4096)
        guest.ram.write(pfns, data)
        assert channel.send_with_external_pfns(b"", pfns) == sha256(data)


def test_several_ranges() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(40)
        data = random.Random(4).randbytes(40 * 4096)
        guest.ram.write(pfns, data)
        ranges = [
            GpaRange(100, 4090, pfns[0:2]),
            GpaRange(4096, 0, pfns[5:6]),
            GpaRange(1, 4095, pfns[7:8]),
            GpaRange(30 * 4096, 0, pfns[10:40]),
        ]
        expected = b"".join(guest.ram.read(r.pfns, r.byte_offset, r.byte_count) for r in ranges)
        assert len(expected) == 100 + 4096 + 1 + 30 * 4096
        transaction = channel.submit_with_external_ranges(b"payload!", ranges)
        assert transaction.wait() == sha256(expected)


def test_payload_goes_along() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(2)
        transaction = channel.submit_with_external_pfns(b"command.", pfns, byte_offset=8)
        assert device.arrived.acquire(timeout=10)
        (packet,) = device.packets
        assert packet.payload == b"command."
        assert packet.completion_requested
        data = packet.external_data
        assert data is not None
        assert len(data) == 8192 - 8
        assert [(r.byte_count, r.byte_offset, list(r.pfns)) for r in data.ranges] == [
            (8184, 8, pfns)
        ]
        packet.complete()
        transaction.wait()


def test_many_in_flight() -> None:
    with SoftwareGuest.for_device(Digest()) as guest, guest.open_channel() as channel:
        pools = [guest.ram.alloc_pages(16) for _ in range(64)]
        data = [random.Random(i).randbytes(16 * 4096) for i in range(64)]
        for pfns, content in zip(pools, data, strict=True):
            guest.ram.write(pfns, content)
        for _ in range(5):
            transactions = [channel.submit_with_external_pfns(b"", pfns) for pfns in pools]
            for transaction, content in zip(transactions, data, strict=True):
                assert transaction.wait() == sha256(content)


def test_largest_packet_that_a_ring_carries() -> None:
    """8-byte PFNs fill a packet up to 65535 * 8 bytes; then the ring refuses."""
    with (
        SoftwareGuest.for_device(Digest()) as guest,
        guest.open_channel(ring_pages=(257, 3)) as channel,
    ):
        (pfn,) = guest.ram.alloc_pages(1)
        guest.ram.write([pfn], b"x" * 4096)
        most = 16384  # 64 MiB, the device's limit
        assert channel.send_with_external_pfns(b"", [pfn] * most) == sha256(b"x" * (64 << 20))
        answer = channel.send_with_external_pfns(b"", [pfn] * (most + 1))
        assert answer == Digest.REJECTED
        with pytest.raises(PacketTooBig):
            channel.send_with_external_pfns(b"", [pfn] * 65533)


REFUSED = {
    "no completion wanted": {"wait_for_completion": False},
    "no PFN": {"pfn_length": 0},
    "PFNs beyond the array": {"pfn_length": 5},
    "offset beyond the array": {"pfn_offset": 4},
    "negative offset": {"pfn_offset": -1},
    "no byte": {"byte_count": 0},
    "fewer bytes than pages": {"byte_count": 3 * 4096},
    "more bytes than pages": {"byte_count": 4 * 4096 + 1},
    "offset leaves no byte": {"byte_offset": 4 * 4096},
    "offset beyond the first page": {"byte_offset": 4 * 4096 + 1, "byte_count": 1},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_it_reaches_the_ring(name: str) -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(4)
        with pytest.raises(SendRefused) as caught:
            channel.send_with_external_pfns(b"", pfns, **REFUSED[name])  # type: ignore[arg-type]
        assert caught.value.status is NtStatus.INVALID_PARAMETER
        assert channel.in_flight == 0
        with pytest.raises(SendRefused):
            channel.send_with_external_pfns(b"", [])
        with pytest.raises(SendRefused):
            channel.submit_with_external_ranges(b"", [])
        transaction = channel.submit(b"the only")
        assert device.arrived.acquire(timeout=10)
        device.packets[0].complete()
        transaction.wait()
        assert [packet.payload for packet in device.packets] == [b"the only"]


# ---- GPADLs -----------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [1, 25, 26, 27, 1000, 20000, 65536])
def test_gpadls_of_many_pages(pages: int) -> None:
    with (
        contextlib.closing(GuestRam([(0, 80 << 20), (0x1_0000_0000, 200 << 20)])) as ram,
        SoftwareGuest.for_device(GpadlDigest(), ram=ram) as guest,
        guest.open_channel() as channel,
    ):
        gpadl = guest.create_gpadl(pages)
        chance = random.Random(pages)
        for pfn in chance.sample(gpadl.owned_pfns, min(pages, 50)):
            ram.write([pfn], chance.randbytes(4096))
        digest = hashlib.sha256()
        for pfn in gpadl.owned_pfns:
            digest.update(ram.page(pfn))
        answer = channel.send(struct.pack("<Q", gpadl.gpadl_id), timeout=60)
        assert answer == digest.digest()
        guest.delete_gpadl(gpadl)
        with pytest.raises(RequestRefused):
            guest.delete_gpadl(gpadl)


def test_gpadl_of_several_ranges() -> None:
    with SoftwareGuest.for_device(GpadlDigest()) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(10)
        guest.ram.write(pfns, random.Random(5).randbytes(10 * 4096))
        ranges = [GpaRange(5000, 200, pfns[:2]), GpaRange(8 * 4096, 0, pfns[2:])]
        gpadl = guest.create_gpadl(ranges)
        expected = guest.ram.read(pfns[:2], 200, 5000) + guest.ram.read(pfns[2:])
        assert channel.send(struct.pack("<Q", gpadl.gpadl_id)) == sha256(expected)


@pytest.mark.parametrize(
    "pfn", [32 << 8, (1 << 20) - 1, 1 << 30, (1 << 52) - 1, 1 << 52, (1 << 64) - 1]
)
def test_gpadl_outside_guest_memory(pfn: int) -> None:
    with SoftwareGuest.for_device(GpadlDigest()) as guest:
        for pages in ([pfn], [1, pfn], [pfn, 1]):
            with pytest.raises(RequestRefused) as caught:
                guest.create_gpadl(pages)
            assert caught.value.status == NtStatus.INVALID_PARAMETER
        assert guest.gpadls == {}
        guest.create_gpadl([1])
