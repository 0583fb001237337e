# SPDX-License-Identifier: GPL-2.0-or-later
"""KMCL's control of a channel: pause and start, defer, requests."""

import threading
import time
from typing import Any

import pytest

from tests.support.devices import CLASS_ID, TestDevice
from tests.support.ram import BASE_PFN
from tests.support.raw_channel import raw_channel, repeat
from tests.support.waiting import eventually, in_thread
from vhostvmbus.channel import Channel, ChannelState, Packet
from vhostvmbus.device import Device
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import PacketType


def held() -> tuple[TestDevice, list[Packet]]:
    packets: list[Packet] = []
    return TestDevice(lambda _, packet: packets.append(packet)), packets  # type: ignore[arg-type]


# -- pause and start -----------------------------------------------------------------------------


def test_a_paused_channel_takes_nothing_until_it_is_started() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.send(transaction_id=1)
        guest.expect()
        guest.channel.pause(10)
        assert guest.channel.paused
        for i in range(2, 6):
            guest.send(transaction_id=i)
        guest.expect_nothing()
        assert guest.channel.stats.packets_received == 1
        assert guest.channel.stats.quota_reached == 0
        guest.channel.start()
        assert [p.transaction_id for p in guest.expect(4)] == [2, 3, 4, 5]
        assert not guest.channel.paused


def test_pause_returns_when_all_packets_taken_are_completed() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        for i in range(3):
            guest.send(transaction_id=i)
        eventually(lambda: len(packets) == 3)
        thread, outcome = in_thread(lambda: guest.channel.pause(20))
        eventually(lambda: guest.channel.paused)
        guest.send(transaction_id=9)
        for packet in packets[:2]:
            packet.complete()
        time.sleep(0.05)
        assert thread.is_alive()
        packets[2].complete()
        thread.join(10)
        assert outcome == [None]
        assert guest.channel.outstanding == 0
        assert len(packets) == 3
        assert [p.transaction_id for p in guest.expect(3)] == [0, 1, 2]
        guest.channel.start()
        eventually(lambda: len(packets) == 4)


def test_pause_waits_for_a_callback_that_runs() -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(_: Channel, packet: Any) -> None:
        packet.complete()
        inside.set()
        leave.wait(10)

    with raw_channel(TestDevice(slow)) as guest:
        guest.send()
        assert inside.wait(5)
        thread, outcome = in_thread(lambda: guest.channel.pause(20))
        time.sleep(0.05)
        assert thread.is_alive()  # nothing is outstanding, but something runs
        leave.set()
        thread.join(10)
        assert outcome == [None]


def test_a_channel_may_start_paused() -> None:
    class Shy(TestDevice):
        def opened(self, channel: Channel) -> None:
            super().opened(channel)
            channel.pause()

    with raw_channel(Shy()) as guest:
        guest.send(b"early", transaction_id=7)
        guest.expect_nothing()
        assert guest.channel.paused
        guest.channel.start()
        assert guest.expect()[0].transaction_id == 7


def test_pausing_again_and_again_loses_nothing() -> None:
    with raw_channel(TestDevice(), out_pages=16, in_pages=16) as guest:
        stop = threading.Event()
        failures: list[BaseException] = []

        def control() -> None:
            try:
                while not stop.is_set():
                    guest.channel.pause(10)
                    assert not guest.channel._completions.packets
                    guest.channel.start()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=control)
        thread.start()
        for i in range(500):
            guest.send(transaction_id=i)
            if i % 20 == 0:
                guest.poll()
        assert [p.transaction_id for p in guest.expect(500)] == list(range(500))
        stop.set()
        thread.join(10)
        assert failures == []


def test_the_quota_may_change_while_paused() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        guest.channel.pause(10)
        guest.channel.transaction_quota = 2
        for i in range(5):
            guest.send(transaction_id=i)
        guest.expect_nothing()
        assert guest.channel.transaction_quota == 2
        guest.channel.start()
        eventually(lambda: len(packets) == 2)
        time.sleep(0.05)
        assert len(packets) == 2
        for number in range(5):
            eventually(lambda: len(packets) > number)  # noqa: B023
            packets[number].complete()
        guest.expect(5)


def test_a_pause_that_takes_too_long() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        guest.send()
        eventually(lambda: packets)
        with pytest.raises(TimeoutError, match="1 packets"):
            guest.channel.pause(0.05)
        assert guest.channel.paused  # it stays so
        packets[0].complete()
        guest.channel.pause(10)


def test_a_pause_ends_with_its_channel() -> None:
    device, packets = held()
    with raw_channel(device) as guest:
        channel = guest.channel
        guest.send()
        eventually(lambda: packets)
        thread, outcome = in_thread(lambda: channel.pause(30))
        eventually(lambda: channel.paused)
        guest.host.close_channel(0)
        thread.join(10)
        assert isinstance(outcome[0], errors.ChannelClosed)
        guest.resume()
        guest.send()
        eventually(lambda: len(packets) == 2)
        thread, outcome = in_thread(lambda: guest.channel.pause(30))
        eventually(lambda: guest.channel.paused)
        packets[1].fail("beyond repair")
        thread.join(10)
        assert isinstance(outcome[0], errors.ChannelClosed)


def test_a_paused_channel_can_be_closed() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        guest.channel.pause(10)
        guest.send(b"unseen")
        guest.host.close_channel(0)
        assert device.events[-2:] == ["suspended", "closed"]


def test_a_pause_inside_a_callback_would_never_end() -> None:
    raised: list[BaseException] = []

    def pausing(channel: Channel, packet: Any) -> None:
        try:
            channel.pause()
        except errors.UsageError as error:
            raised.append(error)
        if not packet.deferred:
            packet.defer()
        else:
            packet.complete()

    with raw_channel(TestDevice(pausing)) as guest:
        guest.send()
        guest.expect()
        assert len(raised) == 2


# -- defer ---------------------------------------------------------------------------------------


def test_a_deferred_packet_comes_again_while_the_worker_goes_on() -> None:
    release = threading.Event()
    seen: list[tuple[int, bool, str]] = []

    def receive(channel: Channel, packet: Any) -> None:
        name = threading.current_thread().name
        seen.append((packet.transaction_id, packet.deferred, name))
        if packet.transaction_id >= 10 or packet.deferred:
            if packet.deferred:
                release.wait(10)
            packet.complete(packet.external_data.read(0, 8) if packet.external_data else b"")
        else:
            packet.defer()

    with raw_channel(TestDevice(receive)) as guest:
        guest.ram.write([BASE_PFN + 100], b"the page")
        guest.send_direct(b"", [GpaRange.of_pages([BASE_PFN + 100])], transaction_id=1)
        guest.send(transaction_id=2)
        guest.send(transaction_id=10)
        assert guest.expect()[0].transaction_id == 10  # overtook both
        release.set()
        answers = guest.expect(2)
        assert [(p.transaction_id, p.payload) for p in answers] == [(1, b"the page"), (2, b"")]
        again = [(number, name) for number, deferred, name in seen if deferred]
        assert [number for number, _ in again] == [1, 2]  # in order
        assert {name for _, name in again} == {"test/0 deferred"}
        assert {name for _, deferred, name in seen if not deferred} == {"test/0"}


def test_defer_only_inside_the_first_delivery() -> None:
    mistakes: list[str] = []
    kept: list[Any] = []

    def expect_refusal(packet: Any, where: str) -> None:
        try:
            packet.defer()
        except errors.UsageError:
            mistakes.append(where)

    def receive(channel: Channel, packet: Any) -> None:
        if packet.deferred:
            expect_refusal(packet, "again")
            packet.complete()
        elif packet.transaction_id == 1:
            packet.defer()
            expect_refusal(packet, "twice")
            kept.append(packet)
        elif packet.transaction_id == 2:
            packet.complete()
            expect_refusal(packet, "completed")
        else:
            kept.append(packet)

    class Rejecting(TestDevice):
        def packet_rejected(
            self, channel: Channel, packet: Packet, error: errors.PacketError
        ) -> None:
            expect_refusal(packet, "rejected")
            packet.complete()

    with raw_channel(Rejecting(receive)) as guest:
        guest.send(transaction_id=1)
        guest.send(transaction_id=2)
        guest.expect(2)
        guest.send(transaction_id=3)
        eventually(lambda: len(kept) == 2)
        expect_refusal(kept[1], "another thread")
        kept[1].complete()
        guest.expect()
        guest.send_direct(b"", [GpaRange(0, 0, [])], transaction_id=4)
        guest.expect()
        assert sorted(mistakes) == ["again", "another thread", "completed", "rejected", "twice"]


def test_an_exception_in_the_second_delivery_stops_the_channel() -> None:
    def receive(channel: Channel, packet: Any) -> None:
        if packet.deferred:
            raise RuntimeError("a bug")
        packet.defer()

    with raw_channel(TestDevice(receive)) as guest:
        guest.send()
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert guest.channel.stats.errors["DeviceException"] == 1


def test_deferred_packets_are_dropped_when_the_channel_closes() -> None:
    inside, leave = threading.Event(), threading.Event()
    delivered: list[int] = []

    def receive(channel: Channel, packet: Any) -> None:
        if not packet.deferred:
            packet.defer()
            return
        delivered.append(packet.transaction_id)
        inside.set()
        leave.wait(10)

    with raw_channel(TestDevice(receive)) as guest:
        channel = guest.channel
        for i in range(4):
            guest.send(transaction_id=i)
        assert inside.wait(5)
        eventually(lambda: channel.outstanding == 4)
        thread, _ = in_thread(lambda: guest.host.close_channel(0))
        time.sleep(0.05)
        assert thread.is_alive()  # a callback runs
        leave.set()
        thread.join(10)
        assert not thread.is_alive()
        assert delivered == [0]
        assert channel.stats.dropped == 4


def test_deferred_packets_are_answered_when_only_the_connection_ends() -> None:
    def receive(channel: Channel, packet: Any) -> None:
        if not packet.deferred:
            packet.defer()
        else:
            time.sleep(0.02)
            packet.complete()

    with raw_channel(TestDevice(receive)) as guest:
        for i in range(5):
            guest.send(transaction_id=i)
        eventually(lambda: guest.channel.stats.packets_received == 5)
        guest.host.disconnect()
        assert [p.transaction_id for p in guest.expect(5)] == list(range(5))


def test_a_coroutine_cannot_defer() -> None:
    class Asynchronous(Device):
        class_id = CLASS_ID

        async def packet_received(self, channel: Channel, packet: Packet) -> None:
            with pytest.raises(errors.UsageError):
                packet.defer()
            packet.complete(b"waits by itself.")

    with raw_channel(Asynchronous()) as guest:
        guest.send()
        assert guest.expect()[0].payload == b"waits by itself."


# -- requests ------------------------------------------------------------------------------------


def test_a_request_that_waits_for_nothing() -> None:
    with raw_channel(TestDevice(), in_pages=2) as guest:
        assert guest.channel.request(b"at once.", 0, wait_for_completion=False) == b""
        (packet,) = guest.expect()
        assert (packet.payload, packet.completion_requested) == (b"at once.", False)
        with pytest.raises(errors.RingFull) as caught:
            repeat(lambda _: guest.channel.request(bytes(500), 0, wait_for_completion=False), 100)
        assert caught.value.status is NtStatus.BUFFER_OVERFLOW
        assert guest.channel.as_dict()["queued"] == 0  # where send() would queue
        guest.channel.send(bytes(500))
        with pytest.raises(errors.RingFull):
            guest.channel.request(b"", 0, wait_for_completion=False)  # not past the queue
        sent = guest.channel.stats.packets_sent
        assert len(guest.expect(sent - 1)) == sent - 1


def test_a_request_may_be_cancelled() -> None:
    with raw_channel(TestDevice()) as guest:
        cancel = threading.Event()
        thread, outcome = in_thread(lambda: guest.channel.request(b"q", 30, cancel=cancel))
        (packet,) = guest.expect()
        time.sleep(0.05)
        assert thread.is_alive()
        cancel.set()
        thread.join(10)
        (error,) = outcome
        assert isinstance(error, errors.RequestCancelled)
        assert error.status is NtStatus.CANCELLED
        # its completion is one for nothing that is in flight
        guest.ring.send(PacketType.COMP, b"", transaction_id=packet.transaction_id).check()
        guest.wake()
        eventually(lambda: guest.channel.stats.errors["CompletionUnexpected"] == 1)


def test_a_request_on_a_closed_channel() -> None:
    with raw_channel(TestDevice()) as guest:
        channel = guest.channel
        guest.host.close_channel(0)
        for arguments in ({}, {"timeout": 0, "wait_for_completion": False}):
            with pytest.raises(errors.ChannelClosed) as caught:
                channel.request(b"late", **arguments)  # type: ignore[arg-type]
            assert caught.value.status is NtStatus.DEVICE_REMOVED
