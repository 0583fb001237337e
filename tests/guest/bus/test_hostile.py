# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that lies, over a real socket: its channel suffers, the others and the process do not."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.devices import Digest, Silent
from tests.support.soak import examples
from vhostvmbus.guest import GuestChannel, GuestRam, HostileChannel, RamRegion, SoftwareGuest
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.vmbus import COMPLETION_REQUESTED, Descriptor, PacketType

PAGE = 4096
RANGE_OUTSIDE = 1 << 40


class HostileDigest(Digest):
    """A device with two channels: one for the liar, one for the honest driver."""

    channels = 2
    max_channels = 2
    max_external_data = 1 << 20
    max_external_ranges = 16
    max_packet_size = 1024
    name = "digest"


class Scene:
    """A liar on channel 0 and an honest driver on channel 1."""

    def __init__(self, guest: SoftwareGuest, device: HostileDigest) -> None:
        self.guest = guest
        self.device = device
        self.honest = guest.enable(1)
        self.open()

    def open(self) -> None:
        self.channel = self.guest.enable(0)
        self.liar = HostileChannel(self.channel.ring, self.channel.kick_fd)

    def errors(self) -> dict[str, int]:
        """Errors of the liar's channel, by name."""
        assert self.guest.host is not None
        (stats,) = [c for c in self.guest.host.stats()["channels"] if c["index"] == 0]
        found = stats["errors"]
        assert isinstance(found, dict)
        return found

    def wait_for_error(self, name: str) -> None:
        deadline = time.monotonic() + 10
        while name not in self.errors():
            assert time.monotonic() < deadline, f"no {name}, but {self.errors()}"
            time.sleep(0.002)

    def check_honest(self) -> None:
        """The other channel goes on, and so does this one when it is opened anew."""
        assert len(self.honest.send(b"honest..")) == 32
        self.guest.disable(0)
        self.open()
        assert len(self.channel.send(b"reformed")) == 32


@pytest.fixture
def scene() -> Iterator[Scene]:
    device = HostileDigest()
    with SoftwareGuest.for_device(device) as guest:
        scene = Scene(guest, device)
        yield scene
        scene.check_honest()


# ---- what breaks the ring ---------------------------------------------------------------


@pytest.mark.parametrize("index", [1, 4, 7, 65536, 65544, 0x7FFFFFF8, 0xFFFFFFF8, 0xFFFFFFFF])
def test_write_index(scene: Scene, index: int) -> None:
    scene.liar.out_ring.write_index = index
    scene.liar.kick()
    scene.wait_for_error("RingIndexInvalid")


def test_write_index_beyond_what_was_written(scene: Scene) -> None:
    """An index in the ring, but nothing except zeros below it."""
    scene.liar.out_ring.write_index = 4096
    scene.liar.kick()
    scene.wait_for_error("PacketLengthInvalid")


@pytest.mark.parametrize("size", [8, 16])
def test_half_a_descriptor(scene: Scene, size: int) -> None:
    scene.liar.out_ring.put(bytes(size))
    scene.liar.kick()
    scene.wait_for_error("DescriptorTruncated")


@pytest.mark.parametrize(
    ("offset8", "len8", "error"),
    [
        (2, 0, "PacketLengthInvalid"),
        (2, 1, "PacketLengthInvalid"),
        (2, 4, "PacketLengthInvalid"),
        (2, 0xFFFF, "PacketLengthInvalid"),
        (0, 3, "PacketOffsetInvalid"),
        (1, 3, "PacketOffsetInvalid"),
        (4, 3, "PacketOffsetInvalid"),
        (0xFFFF, 3, "PacketOffsetInvalid"),
    ],
)
def test_lengths_in_the_descriptor(scene: Scene, offset8: int, len8: int, error: str) -> None:
    descriptor = Descriptor(PacketType.DATA_INBAND, offset8, len8, COMPLETION_REQUESTED, 1)
    scene.liar.put_packet(descriptor, b"8 bytes.")
    scene.wait_for_error(error)


@pytest.mark.parametrize("index", [1, 65536, 0xFFFFFFF8])
def test_read_index_of_the_in_ring(scene: Scene, index: int) -> None:
    """The host finds out when it wants to complete."""
    scene.liar.in_ring.read_index = index
    scene.liar.put_packet(
        Descriptor(PacketType.DATA_INBAND, 2, 3, COMPLETION_REQUESTED, 1), b"8 bytes."
    )
    scene.wait_for_error("RingIndexInvalid")


# ---- what spoils one packet -------------------------------------------------------------


def answer_to(scene: Scene, transaction_id: int) -> bytes:
    """The completion of a packet that the liar put into the ring by hand."""
    channel = scene.channel
    deadline = time.monotonic() + 10
    while not channel.stray_completions:
        assert time.monotonic() < deadline
        channel._pump_once(deadline)
    completion = channel.stray_completions.pop(0)
    assert completion.transaction_id == transaction_id
    return completion.payload


BAD_RANGES: dict[str, tuple[list[GpaRange], int | None, str]] = {
    "no range": ([], 0, "GpaRangeCountInvalid"),
    "more ranges than there are": ([GpaRange(PAGE, 0, [1])], 2, "GpaRangeTruncated"),
    "far more": ([GpaRange(PAGE, 0, [1])], 0xFFFFFFFF, "GpaRangeCountInvalid"),
    "more than the device takes": ([GpaRange(8, 0, [1])] * 17, None, "GpaRangeCountInvalid"),
    "no byte": ([GpaRange(0, 0, [1])], None, "GpaRangeEmpty"),
    "no PFN": ([GpaRange(PAGE, 0, [])], None, "GpaRangeTruncated"),
    "no PFN and no byte": ([GpaRange(0, 0, [])], None, "GpaRangeEmpty"),
    "count of all ones": ([GpaRange(0xFFFFFFFF, 0, [1])], None, "GpaRangeTooLong"),
    "count beyond the PFNs": ([GpaRange(PAGE + 1, 0, [1])], None, "GpaRangeTruncated"),
    "offset beyond the PFNs": ([GpaRange(1, PAGE, [1])], None, "GpaRangeTruncated"),
    "offset and count overflow": (
        [GpaRange(0xFFFFFFFF, 0xFFFFFFFF, [1])],
        None,
        "GpaRangeTooLong",
    ),
    "more bytes than the device takes": (
        [GpaRange((1 << 20) + 1, 0, [1] * 257)],
        None,
        "GpaRangeTooLong",
    ),
    "more in several": ([GpaRange(1 << 17, 0, [1] * 32)] * 9, None, "GpaRangeTooLong"),
    "PFN outside": ([GpaRange(PAGE, 0, [RANGE_OUTSIDE])], None, "PfnOutsideMemory"),
    "PFN in the hole": ([GpaRange(PAGE, 0, [32 << 8])], None, "PfnOutsideMemory"),
    "PFN beyond 2**52": ([GpaRange(PAGE, 0, [1 << 52])], None, "PfnOutsideMemory"),
    "PFN of all ones": ([GpaRange(PAGE, 0, [(1 << 64) - 1])], None, "PfnOutsideMemory"),
    "the last of many": ([GpaRange(3 * PAGE, 0, [1, 2, RANGE_OUTSIDE])], None, "PfnOutsideMemory"),
    "the second range": (
        [GpaRange(PAGE, 0, [1]), GpaRange(PAGE, 0, [RANGE_OUTSIDE])],
        None,
        "PfnOutsideMemory",
    ),
}


@pytest.mark.parametrize("name", BAD_RANGES)
def test_bad_ranges(scene: Scene, name: str) -> None:
    """The packet is refused, with its error; the channel goes on."""
    ranges, count, error = BAD_RANGES[name]
    scene.liar.put_gpa_direct(ranges, b"payload.", transaction_id=0x1234, range_count=count)
    assert answer_to(scene, 0x1234) == Digest.REJECTED
    assert [type(rejection).__name__ for rejection in scene.device.rejections] == [error]
    assert scene.errors() == {error: 1}
    scene.liar.put_gpa_direct([GpaRange(PAGE, 0, [1])], transaction_id=0x1235)
    assert len(answer_to(scene, 0x1235)) == 32


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 5, 7, 8, 12, 13, 14, 0xFFFF])
def test_unexpected_types(scene: Scene, kind: int) -> None:
    scene.liar.put_packet(Descriptor(kind, 2, 3, COMPLETION_REQUESTED, 7), b"8 bytes.")
    assert answer_to(scene, 7) == Digest.REJECTED
    assert scene.errors() == {"PacketTypeUnexpected": 1}


def test_payload_beyond_the_device(scene: Scene) -> None:
    body = bytes(1032)
    descriptor = Descriptor(PacketType.DATA_INBAND, 2, 2 + 129, COMPLETION_REQUESTED, 8)
    scene.liar.put_packet(descriptor, body)
    assert answer_to(scene, 8) == Digest.REJECTED
    assert scene.errors() == {"PacketTooLarge": 1}


def test_completion_that_nobody_waits_for(scene: Scene) -> None:
    scene.liar.put_packet(Descriptor(PacketType.COMP, 2, 3, 0, 99), b"8 bytes.")
    scene.wait_for_error("CompletionUnexpected")
    scene.liar.put_gpa_direct([GpaRange(PAGE, 0, [1])])
    answer_to(scene, 1)


def test_external_data_without_a_completion(scene: Scene) -> None:
    """WAIT_FOR_COMPLETION is the client endpoint's rule; on the wire the flag may be missing."""
    scene.liar.put_gpa_direct([GpaRange(PAGE, 0, [1])], transaction_id=1, flags=0)
    scene.liar.put_gpa_direct([GpaRange(PAGE, 0, [1])], transaction_id=2)
    assert len(answer_to(scene, 2)) == 32


def test_trailer_is_not_looked_at(scene: Scene) -> None:
    descriptor = Descriptor(PacketType.DATA_INBAND, 2, 3, COMPLETION_REQUESTED, 3)
    scene.liar.put_packet(descriptor, b"8 bytes.", trailer=b"\xff" * 8)
    assert len(answer_to(scene, 3)) == 32


def test_a_transaction_id_twice_in_flight() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        liar = HostileChannel(channel.ring, channel.kick_fd)
        for _ in range(2):
            liar.put_gpa_direct([GpaRange(PAGE, 0, [1])], transaction_id=5)
            assert device.arrived.acquire(timeout=10)
        for number, packet in enumerate(device.packets):
            packet.complete(struct.pack("<Q", number))
        deadline = time.monotonic() + 10
        while len(channel.stray_completions) < 2:
            assert time.monotonic() < deadline
            channel._pump_once(deadline)
        answers = [(c.transaction_id, c.payload[0]) for c in channel.stray_completions]
        assert answers == [(5, 0), (5, 1)]


# ---- changing things meanwhile ----------------------------------------------------------


def test_pages_change_while_the_device_reads(scene: Scene) -> None:
    channel = scene.channel
    pfns = scene.guest.ram.alloc_pages(64)
    chance = random.Random(1)
    transactions = []
    for _ in range(50):
        transactions.append(channel.submit_with_external_pfns(b"", pfns))
        for pfn in pfns[:4]:
            scene.guest.ram.write([pfn], chance.randbytes(64))
    for transaction in transactions:
        assert len(transaction.wait()) == 32


def test_indices_change_all_the_time(scene: Scene) -> None:
    chance = random.Random(2)
    for _ in range(300):
        scene.liar.out_ring.write_index = chance.choice([chance.getrandbits(32), 8, 64, 4096])
        scene.liar.in_ring.read_index = chance.getrandbits(16) & ~7
        scene.liar.in_ring.interrupt_mask = chance.getrandbits(1)
        scene.liar.in_ring.pending_send_size = chance.getrandbits(32)
        scene.liar.kick()


def test_call_counter_is_full(scene: Scene) -> None:
    """An eventfd that cannot take another signal does not block the host."""
    os.eventfd_write(scene.channel.call_fd, (1 << 64) - 2)
    assert len(scene.channel.send(b"12345678")) == 32


@contextlib.contextmanager
def fuzzed_scene() -> Iterator[Scene]:
    device = HostileDigest()
    with SoftwareGuest.for_device(device) as guest:
        scene = Scene(guest, device)
        yield scene
        scene.check_honest()


def test_random_rings() -> None:
    """Whatever bytes are in the ring, and wherever the index is."""
    with fuzzed_scene() as scene:

        @settings(
            max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        @given(st.binary(min_size=0, max_size=2000), st.integers(0, (1 << 32) - 1), st.booleans())
        def throw(data: bytes, index: int, aligned: bool) -> None:
            scene.liar.out_ring.write(0, data)
            size = (len(data) + 7) & ~7
            scene.liar.out_ring.write_index = size if aligned else index
            scene.liar.kick()
            assert len(scene.honest.send(b"honest..")) == 32
            scene.guest.disable(0)
            scene.open()

        throw()


def test_random_packets() -> None:
    """Descriptors that are right about their length, and arbitrary otherwise."""
    with fuzzed_scene() as scene:

        @settings(max_examples=examples(300), deadline=None)
        @given(
            st.sampled_from([*PacketType, 0x77]),
            st.binary(max_size=400),
            st.integers(0, 60),
            st.integers(0, 0xFFFF),
            st.integers(0, (1 << 64) - 1),
        )
        def throw(kind: int, body: bytes, offset8: int, flags: int, number: int) -> None:
            body += bytes(-len(body) % 8)
            scene.liar.put_packet(
                Descriptor(int(kind), offset8, 2 + len(body) // 8, flags, number), body
            )
            if "PacketOffsetInvalid" in scene.errors():
                scene.guest.disable(0)
                scene.open()
            drain(scene.channel)

        throw()
        scene.guest.disable(0)
        scene.open()


def drain(channel: GuestChannel) -> None:
    """Take what the host completed, so that its ring does not fill."""
    channel._pump_once(time.monotonic())
    channel.stray_completions.clear()


def test_flood_that_reads_no_answer() -> None:
    """The host's memory does not grow with a guest that only asks."""
    with fuzzed_scene() as scene:
        ring = scene.channel.ring
        sent = 0
        end = time.monotonic() + 2
        while time.monotonic() < end:
            one = ring.send(PacketType.DATA_INBAND, b"8 bytes.", flags=COMPLETION_REQUESTED)
            assert one.error is None
            sent += one.entered
            scene.channel.kick()
        assert scene.guest.host is not None
        (stats,) = [c for c in scene.guest.host.stats()["channels"] if c["index"] == 0]
        assert stats["outstanding"] <= scene.device.transaction_quota
        assert sent > scene.device.transaction_quota
        assert len(scene.honest.send(b"honest..")) == 32


# ---- memory that goes away --------------------------------------------------------------


def test_removing_memory_fails_what_lies_in_it() -> None:
    device = HostileDigest()
    with SoftwareGuest.for_device(device) as guest:
        region = guest.ram.add(0x2_0000_0000, 1 << 20)
        guest.add_memory(region)
        pfn = region.guest_phys_addr >> 12
        channel = guest.enable(0)
        assert len(channel.send_with_external_pfns(b"", [pfn])) == 32
        guest.remove_memory(region)
        assert channel.send_with_external_pfns(b"", [pfn]) == Digest.REJECTED
        guest.add_memory(region)
        assert len(channel.send_with_external_pfns(b"", [pfn])) == 32


def test_memory_is_not_removed_under_a_packet() -> None:
    """The acknowledgement waits for the packet, or takes its data away."""
    device = Silent()
    with SoftwareGuest.for_device(device) as guest:
        region = guest.ram.add(0x2_0000_0000, 1 << 20)
        guest.add_memory(region)
        pfn = region.guest_phys_addr >> 12
        channel = guest.enable()
        transaction = channel.submit_with_external_pfns(b"", [pfn])
        assert device.arrived.acquire(timeout=10)
        guest.remove_memory(region)
        assert transaction.wait() == b""
        device.packets[0].complete(b"too late")
        assert channel.stray_completions == []


@contextlib.contextmanager
def truncatable() -> Iterator[tuple[Scene, RamRegion]]:
    """Rings in low memory, and a region beyond 4 GiB whose file may shrink."""
    device = HostileDigest()
    with (
        contextlib.closing(GuestRam([(0, 32 << 20)])) as ram,
        SoftwareGuest.for_device(device, ram=ram) as guest,
    ):
        scene = Scene(guest, device)
        region = ram.add(0x1_0000_0000, 1 << 20)
        guest.add_memory(region)
        yield scene, region


def test_truncated_external_data() -> None:
    """SIGBUS costs an error, not the process."""
    with truncatable() as (scene, region):
        pfn = region.guest_phys_addr >> 12
        assert len(scene.channel.send_with_external_pfns(b"", [pfn])) == 32
        os.ftruncate(region.fd, region.mmap_offset)
        scene.channel.send_with_external_pfns(b"", [1, pfn])
        assert scene.errors() == {"GuestMemoryLost": 1}
        assert len(scene.channel.send_with_external_pfns(b"", [1])) == 32
        assert len(scene.honest.send(b"honest..")) == 32


def test_truncated_ring() -> None:
    with truncatable() as (scene, region):
        scene.guest.disable(0)
        first = region.guest_phys_addr >> 12
        taken = scene.guest.ram.alloc_pages(scene.guest.ram.free_page_count)
        scene.guest.ram.free_pages(range(first, first + 64))
        scene.open()
        assert min(scene.channel.ring.pfns) >= first
        os.ftruncate(region.fd, region.mmap_offset)
        scene.liar.kick()
        scene.wait_for_error("RingMemoryLost")
        assert len(scene.honest.send(b"honest..")) == 32
        scene.guest.disable(0)
        scene.guest.ram.free_pages([pfn for pfn in taken if pfn < first])
        while any(pfn >= first for pfn in scene.guest.ram.alloc_pages(64)):
            pass  # use up the lost pages
        scene.open()
        assert len(scene.channel.send(b"reformed")) == 32


@pytest.mark.parametrize("size", [0, 4096, 4095])
def test_region_larger_than_its_file(size: int) -> None:
    with SoftwareGuest.for_device(Digest()) as guest:
        region = guest.ram.add(0x2_0000_0000, 8192)
        os.ftruncate(region.fd, region.mmap_offset + size)
        with pytest.raises(RequestRefused):
            guest.add_memory(region)
