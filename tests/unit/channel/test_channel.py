# SPDX-License-Identifier: GPL-2.0-or-later
"""A channel at the host's end: completions, quota, full rings, host-initiated packets, errors."""

import threading
import time
from typing import Any

import pytest

from tests.support.devices import TestDevice
from tests.support.ram import BASE_PFN, PAGES
from tests.support.raw_channel import raw_channel, repeat
from tests.support.rings import raw_packet, set_word
from tests.support.waiting import eventually, together
from vhostvmbus.channel import Channel, ChannelState, Packet
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import RING_FEATURE_BITS, RING_READ_INDEX, RING_WRITE_INDEX, PacketType


def held() -> tuple[TestDevice, list[Packet]]:
    """A device that keeps its packets for the test to complete."""
    packets: list[Packet] = []
    return TestDevice(lambda _, packet: packets.append(packet)), packets  # type: ignore[arg-type]


# -- completions ---------------------------------------------------------------------------------


def test_an_echo() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.send(b"hello", transaction_id=77)
        (answer,) = guest.expect()
        assert (answer.type, answer.transaction_id) == (PacketType.COMP, 77)
        assert answer.payload == b"hello\0\0\0"
        stats = guest.channel.stats
        assert (stats.packets_received, stats.bytes_received, stats.completions_sent) == (1, 8, 1)


def test_external_data_is_read_and_written() -> None:
    def swap(_: Channel, packet: Any) -> None:
        data = packet.external_data.read()
        packet.external_data.write(data[::-1])
        packet.complete(data[:8])

    with raw_channel(TestDevice(swap)) as guest:
        guest.ram.write([BASE_PFN + 100], b"abcdefgh", 10)
        guest.send_direct(b"", [GpaRange(8, 10, [BASE_PFN + 100])])
        assert guest.expect()[0].payload == b"abcdefgh"
        assert guest.ram.read([BASE_PFN + 100], 10, 8) == b"hgfedcba"


def test_nothing_is_sent_when_no_completion_was_requested() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.send(b"one-way", flags=0)
        guest.send(b"both-way", transaction_id=2)
        assert [p.transaction_id for p in guest.expect()] == [2]
        guest.expect_nothing()
        assert guest.channel.outstanding == 0


def test_completions_from_other_threads_in_another_order() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        for i in range(20):
            guest.send(transaction_id=i)
        eventually(lambda: len(packets) == 20)
        assert guest.channel.outstanding == 20
        threads = [
            threading.Thread(target=packet.complete, args=(bytes([packet.transaction_id]),))
            for packet in reversed(packets)
        ]
        for thread in threads:
            thread.start()
        answers = guest.expect(20)
        for thread in threads:
            thread.join()
        assert sorted(p.transaction_id for p in answers) == list(range(20))
        assert all(p.payload[0] == p.transaction_id for p in answers)
        assert guest.channel.outstanding == 0


def test_a_transaction_id_may_be_in_use_twice() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        guest.send(b"a", transaction_id=5)
        guest.send(b"b", transaction_id=5)
        eventually(lambda: len(packets) == 2)
        packets[1].complete(b"b")
        packets[0].complete(b"a")
        assert [(p.transaction_id, p.payload[:1]) for p in guest.expect(2)] == [
            (5, b"b"),
            (5, b"a"),
        ]


def test_the_second_completion_is_the_authors_error() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        guest.send_direct(b"", [GpaRange.of_pages([BASE_PFN + 100])], transaction_id=3)
        eventually(lambda: packets)
        packets[0].complete(b"once")
        with pytest.raises(errors.AlreadyCompleted):
            packets[0].complete(b"twice")
        with pytest.raises(errors.AlreadyCompleted):
            packets[0].fail("as well")
        assert packets[0].external_data is not None
        with pytest.raises(errors.ExternalDataClosed):
            packets[0].external_data.read()
        assert len(guest.expect()) == 1
        guest.expect_nothing()
        assert guest.channel.state is ChannelState.RUNNING


def test_only_one_of_many_completers_wins() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        for i in range(50):
            guest.send(transaction_id=i)
        eventually(lambda: len(packets) == 50)
        wins: list[int] = []

        def complete_all() -> None:
            for packet in packets:
                try:
                    packet.complete()
                    wins.append(packet.transaction_id)
                except errors.AlreadyCompleted:
                    pass

        together(*[complete_all] * 4)
        assert sorted(wins) == list(range(50))
        assert sorted(p.transaction_id for p in guest.expect(50)) == list(range(50))
        guest.expect_nothing()


def test_gathered_completions_come_in_order_and_with_few_signals() -> None:
    device = TestDevice()
    device.gather_completions = True
    release = threading.Event()
    device.on_packet = lambda _, packet: (release.wait(10), packet.complete(packet.payload))  # type: ignore[attr-defined]
    with raw_channel(device) as guest:
        guest.send(b"first", transaction_id=0)
        for i in range(1, 40):
            guest.send(transaction_id=i)
        release.set()
        assert [p.transaction_id for p in guest.expect(40)] == list(range(40))
        assert guest.channel.stats.signals_sent <= 6


@pytest.mark.parametrize("gather", [False, True])
def test_a_completion_that_never_fits_takes_nothing_with_it(gather: bool) -> None:
    """The author is told while the packet is still his, and can complete it with less."""
    raised: list[bool] = []

    def complete(_: Channel, packet: Any) -> None:
        try:
            packet.complete(bytes(int.from_bytes(packet.payload, "little")))
        except errors.PacketTooBig:
            raised.append(packet.completed)
            packet.complete(b"too big!")

    device = TestDevice(complete)
    device.gather_completions = gather
    with raw_channel(device, in_pages=2) as guest:
        longest = 4096 - 32
        for size in (8, longest, longest + 1, 1 << 19, 16):
            guest.send(size.to_bytes(8, "little"), transaction_id=size)
        answers = guest.expect(5)
        assert [len(p.payload) for p in answers] == [8, longest, 8, 8, 16]
        assert raised == [False, False]
        assert guest.channel.state is ChannelState.RUNNING


# -- quota and full rings ------------------------------------------------------------------------


def test_the_quota_bounds_what_is_outstanding() -> None:
    device, packets = held()
    device.transaction_quota = 4
    with raw_channel(device) as guest:
        for i in range(10):
            guest.send(transaction_id=i)
        eventually(lambda: len(packets) == 4)
        time.sleep(0.05)
        assert len(packets) == 4
        packets[0].complete()
        eventually(lambda: len(packets) == 5)
        guest.channel.transaction_quota = 2  # below what is outstanding: nothing new
        packets[1].complete()
        packets[2].complete()
        time.sleep(0.05)
        assert len(packets) == 5
        packets[3].complete()
        eventually(lambda: len(packets) == 6)
        guest.channel.transaction_quota = 100
        eventually(lambda: len(packets) == 10)
        with pytest.raises(ValueError, match="at least 1"):
            guest.channel.transaction_quota = 0
        for packet in packets[4:]:
            packet.complete()
        assert [p.transaction_id for p in guest.expect(10)] == list(range(10))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("feature", [1, 0])
def test_completions_wait_for_space_in_order(feature: int, gather: bool) -> None:
    device = TestDevice()
    device.gather_completions = gather
    with raw_channel(device, out_pages=16, in_pages=2) as guest:
        guest.ring.pages(True)[RING_FEATURE_BITS] = feature
        payload = bytes(1000)
        for i in range(40):
            guest.send(payload, transaction_id=i)
        eventually(lambda: guest.channel.stats.ring_full > 0)
        answers = guest.expect(40)
        assert [p.transaction_id for p in answers] == list(range(40))
        assert all(p.payload == payload for p in answers)
        assert guest.channel.outstanding == 0


def test_queued_completions_count_against_the_quota() -> None:
    device = TestDevice()
    device.transaction_quota = 8
    with raw_channel(device, out_pages=32, in_pages=2) as guest:
        for i in range(64):
            guest.send(bytes(1000), transaction_id=i)
        eventually(lambda: guest.channel.stats.quota_reached > 0)
        assert guest.channel.outstanding <= 8
        assert [p.transaction_id for p in guest.expect(64)] == list(range(64))


def test_a_flood_is_taken_in_batches() -> None:
    done: list[int] = []
    device = TestDevice()
    device.processing_complete = lambda _, count: done.append(count)  # type: ignore[method-assign]
    with raw_channel(device, out_pages=64, in_pages=64) as guest:
        for i in range(2000):
            guest.send(b"x" * 32, transaction_id=i)
            if i % 50 == 0:
                guest.poll()
        assert [p.transaction_id for p in guest.expect(2000)] == list(range(2000))
        eventually(lambda: sum(done) == 2000)
        assert guest.kicks < 2000
        assert guest.channel.stats.max_batch <= 64


# -- host-initiated packets ----------------------------------------------------------------------


def test_the_host_sends_and_the_guest_completes() -> None:
    with raw_channel(TestDevice()) as guest:
        done: list[bytes | None] = []
        assert guest.channel.send(b"plain") == 0
        transaction = guest.channel.send(b"question", on_completion=done.append)
        plain, question = guest.expect(2)
        assert (plain.transaction_id, plain.completion_requested) == (0, False)
        assert (question.transaction_id, question.completion_requested) == (transaction, True)
        guest.ring.send(PacketType.COMP, b"answer!!", transaction_id=transaction).check()
        guest.wake()
        eventually(lambda: done)
        assert done == [b"answer!!"]


def test_a_packet_without_a_completion_takes_nobodys_callback() -> None:
    """It has the id of one that waits for its own, and the ring cannot be followed any more."""
    with raw_channel(TestDevice()) as guest:
        done: list[bytes | None] = []
        transaction = guest.channel.send(b"question", on_completion=done.append)
        set_word(guest.ring, False, RING_READ_INDEX, 5)
        with pytest.raises(errors.ChannelClosed):
            guest.channel.send(b"", transaction_id=transaction)
        guest.host.close_channel(0)
        assert done == [None]


def test_a_request_waits_for_its_completion() -> None:
    with raw_channel(TestDevice()) as guest:
        results: list[bytes] = []
        thread = threading.Thread(target=lambda: results.append(guest.channel.request(b"q", 10)))
        thread.start()
        (packet,) = guest.expect()
        guest.ring.send(PacketType.COMP, b"a" * 8, transaction_id=packet.transaction_id).check()
        guest.wake()
        thread.join(5)
        assert results == [b"a" * 8]
        with pytest.raises(TimeoutError):
            guest.channel.request(b"q", 0.01)


def test_a_request_ends_with_its_channel() -> None:
    with raw_channel(TestDevice()) as guest:
        raised: list[BaseException] = []

        def ask() -> None:
            try:
                guest.channel.request(b"q", 10)
            except errors.ChannelClosed as error:
                raised.append(error)

        channel = guest.channel
        thread = threading.Thread(target=ask)
        thread.start()
        guest.expect()
        guest.host.close_channel(0)
        thread.join(5)
        assert len(raised) == 1
        with pytest.raises(errors.ChannelClosed):
            channel.send(b"late")


def test_a_request_on_the_worker_would_never_end() -> None:
    raised: list[BaseException] = []

    def ask(channel: Channel, packet: Any) -> None:
        try:
            channel.request(b"q", 1)
        except errors.UsageError as error:
            raised.append(error)
        packet.complete()

    with raw_channel(TestDevice(ask)) as guest:
        guest.send()
        guest.expect()
        assert len(raised) == 1


def test_host_packets_wait_in_order_when_the_ring_is_full() -> None:
    with raw_channel(TestDevice(), in_pages=2) as guest:
        buffer = bytearray(1000)
        for i in range(30):
            buffer[0] = i
            guest.channel.send(buffer, transaction_id=i)
        assert [(p.transaction_id, p.payload[0]) for p in guest.expect(30)] == [
            (i, i) for i in range(30)
        ]
        with pytest.raises(errors.PacketTooBig):
            guest.channel.send(bytes(5000))
        with pytest.raises(errors.SendQueueFull):
            repeat(lambda _: guest.channel.send(b"flood"), 10000)


def test_a_completion_for_nothing_is_counted() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.ring.send(PacketType.COMP, b"", transaction_id=1234).check()
        guest.wake()
        eventually(lambda: guest.channel.stats.errors["CompletionUnexpected"] == 1)
        guest.send(b"goes on")
        guest.expect()


# -- the guest's mistakes ------------------------------------------------------------------------


def test_a_bad_packet_is_refused_and_the_next_one_served() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.send_direct(b"bad", [GpaRange.of_pages([BASE_PFN + PAGES])], transaction_id=1)
        guest.send(b"good", transaction_id=2)
        answers = guest.expect(2)
        assert [(p.transaction_id, p.payload[:4]) for p in answers] == [(1, b""), (2, b"good")]
        assert guest.channel.stats.errors == {"PfnOutsideMemory": 1}
        assert guest.channel.state is ChannelState.RUNNING


def test_the_device_answers_rejected_packets_itself() -> None:
    seen: list[errors.PacketError] = []

    class Answering(TestDevice):
        def packet_rejected(
            self, channel: Channel, packet: Packet, error: errors.PacketError
        ) -> None:
            seen.append(error)
            assert packet.external_data is None
            packet.complete(b"refused!")

    with raw_channel(Answering()) as guest:
        guest.send_direct(b"payload!", [GpaRange(0, 0, [])], transaction_id=9)
        assert guest.expect()[0].payload == b"refused!"
        assert isinstance(seen[0], errors.GpaRangeEmpty)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (raw_packet(6, b"x" * 8, len8=1), "PacketLengthInvalid"),
        (raw_packet(6, b"x" * 8, len8=0x1FF), "PacketLengthInvalid"),
        (raw_packet(6, b"x" * 8, offset8=1), "PacketOffsetInvalid"),
        (bytes(8), "DescriptorTruncated"),
    ],
)
def test_a_broken_ring_stops_the_channel_only(data: bytes, name: str) -> None:
    failed: list[tuple[int, errors.GuestError]] = []
    with raw_channel(TestDevice()) as guest:
        guest.host.channel_failed = lambda index, error: failed.append((index, error))
        guest.send(b"before", transaction_id=1)
        guest.expect()
        guest.send_bytes(data)
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert type(guest.channel.error).__name__ == name
        eventually(lambda: failed)
        assert [(index, type(error).__name__) for index, error in failed] == [(0, name)]
        assert guest.channel.stats.errors[name] == 1
        # the guest may open it again
        guest.host.close_channel(0)
        assert guest.open() is NtStatus.SUCCESS


def test_garbage_indices_stop_the_channel() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.ring.pages(True)[RING_WRITE_INDEX : RING_WRITE_INDEX + 4] = b"\xff" * 4
        guest.wake()
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert isinstance(guest.channel.error, errors.RingIndexInvalid)
        guest.host.close_channel(0)


def test_a_garbage_read_index_stops_the_channel_at_the_completion() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        guest.send()
        eventually(lambda: packets)
        guest.ring.pages(False)[4:8] = b"\x03\0\0\0"
        packets[0].complete()
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert isinstance(guest.channel.error, errors.RingIndexInvalid)


def test_fail_stops_the_channel_without_an_answer() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        guest.send(transaction_id=1)
        guest.send(transaction_id=2)
        eventually(lambda: len(packets) == 2)
        packets[0].fail("nonsense")
        assert guest.channel.state is ChannelState.FAILED
        assert isinstance(guest.channel.error, errors.PacketFailed)
        packets[1].complete()  # what was taken may still be answered
        assert [p.transaction_id for p in guest.expect()] == [2]
        guest.send(transaction_id=3)
        guest.expect_nothing()
        assert len(packets) == 2


def test_an_exception_in_the_device_stops_its_channel() -> None:
    def broken(_: Channel, packet: object) -> None:
        raise RuntimeError("a bug")

    with raw_channel(TestDevice(broken)) as guest:
        guest.send()
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert guest.channel.stats.errors["DeviceException"] == 1
        guest.host.close_channel(0)
        assert guest.host.device.events[-1] == "closed"  # type: ignore[attr-defined]


def test_a_guest_error_raised_by_the_device_is_counted_by_name() -> None:
    def parse(_: Channel, packet: Any) -> None:
        raise errors.PacketTooLarge("opcode", 0x42, packet.ring_offset)

    with raw_channel(TestDevice(parse)) as guest:
        guest.send()
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert guest.channel.stats.errors["PacketTooLarge"] == 1
        assert "DeviceException" not in guest.channel.stats.errors


def test_other_channels_go_on() -> None:
    # two devices stand for two channels' owners: nothing is shared but the process
    with raw_channel(TestDevice()) as one, raw_channel(TestDevice()) as other:
        one.send_bytes(bytes(64))
        eventually(lambda: one.channel.state is ChannelState.FAILED)
        other.send(b"fine")
        assert other.expect()[0].payload.startswith(b"fine")
