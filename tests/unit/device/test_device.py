# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices and their host: offers, life cycle, asyncio, statistics."""

import asyncio
import json
import os
import threading
import time
from dataclasses import replace

import pytest

from tests.support.devices import CLASS_ID, TestDevice
from tests.support.ram import BASE, BASE_PFN
from tests.support.raw_channel import raw_channel
from tests.support.waiting import eventually
from vhostvmbus.channel import Channel, ChannelState, Packet
from vhostvmbus.device import Device, DeviceHost, RefuseOpen
from vhostvmbus.guest import RequestRefused, SoftwareGuest
from vhostvmbus.wire import errors
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening

# -- offers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("channel_flags", 0x8000),
        ("mmio_megabytes", 65536),
        ("mmio_megabytes", -1),
        ("channels", 0),
        ("channels", 2),
        ("max_channels", 65536),
        ("user_defined", bytes(121)),
        ("transaction_quota", 0),
        ("max_packet_size", 0),
        ("max_external_data", 0),
        ("max_external_ranges", 0),
    ],
)
def test_bad_device_attributes_are_named(field: str, value: object) -> None:
    device = TestDevice()
    setattr(device, field, value)
    with pytest.raises(ValueError, match="max_channels" if value == 2 else field):
        DeviceHost(device)


# -- life cycle ----------------------------------------------------------------------------------


def test_the_order_of_callbacks() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        assert device.events == ["opened", "started"]
        channel = guest.channel
        assert channel.user_data == b"user".ljust(120, b"\0")
        assert channel.vmbus_version == 0x50003
        guest.host.modify_channel(0, 3)
        assert channel.target_vp == 3
        guest.host.close_channel(0)
        assert device.events == ["opened", "started", "suspended", "closed"]
        assert channel.state is ChannelState.CLOSED
        assert channel.as_dict()["state"] == "closed"


def test_a_channel_opens_again_and_again() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        for i in range(20):
            guest.send(transaction_id=i)
            assert guest.expect()[0].transaction_id == i
            guest.host.close_channel(0)
            assert guest.resume() is NtStatus.SUCCESS
        assert device.events.count("opened") == 1
        assert device.events.count("resumed") == 20


def test_a_resumed_channel_goes_on_where_it_was() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        guest.host.close_channel(0)
        guest.send(b"waiting", transaction_id=8)  # nobody is there
        assert guest.resume() is NtStatus.SUCCESS
        assert guest.expect()[0].transaction_id == 8


def test_a_resumed_channel_is_signalled_once() -> None:
    """The back end before may have published a completion and been killed before it signalled."""
    with raw_channel(TestDevice()) as guest:
        guest.host.close_channel(0)
        assert not guest.wait_signalled(0.01)
        assert guest.resume() is NtStatus.SUCCESS
        assert guest.wait_signalled(10)


def test_a_device_may_refuse() -> None:
    class Refusing(TestDevice):
        def opened(self, channel: Channel) -> None:
            raise RefuseOpen(NtStatus.ACCESS_DENIED)

    with SoftwareGuest.direct(Refusing()) as guest:
        with pytest.raises(RequestRefused) as caught:
            guest.enable()
        assert caught.value.status == NtStatus.ACCESS_DENIED
        assert guest.host is not None
        assert guest.host.channels == {}


def test_a_device_that_breaks_in_opened_refuses() -> None:
    class Broken(TestDevice):
        def opened(self, channel: Channel) -> None:
            raise RuntimeError("a bug")

    with SoftwareGuest.direct(Broken()) as guest:
        with pytest.raises(RequestRefused) as caught:
            guest.enable()
        assert caught.value.status == NtStatus.UNSUCCESSFUL
        assert guest.host is not None
        assert guest.host.channels == {}


def test_post_started_may_wait_for_packets() -> None:
    answers: list[bytes] = []

    class Asking(TestDevice):
        def post_started(self, channel: Channel) -> None:
            answers.append(channel.request(b"who", 10))

    with raw_channel(Asking()) as guest:
        (packet,) = guest.expect()
        guest.ring.send(11, b"me......", transaction_id=packet.transaction_id).check()
        guest.wake()
        eventually(lambda: answers == [b"me......"])


def test_started_may_send() -> None:
    class Greeting(TestDevice):
        def started(self, channel: Channel) -> None:
            channel.send(b"welcome!")

    with raw_channel(Greeting()) as guest:
        assert guest.expect()[0].payload == b"welcome!"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"index": 1}, NtStatus.INVALID_PARAMETER),
        ({"index": 0}, NtStatus.INVALID_DEVICE_STATE),  # open already
    ],
)
def test_opens_that_are_refused(change: dict[str, int], status: NtStatus) -> None:
    with raw_channel(TestDevice()) as guest:
        assert guest.open(replace(guest.opening, **change)) is status


def test_opens_with_a_bad_ring_are_refused() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.host.close_channel(0)

        def attempt(gpadl: int = guest.opening.gpadl_id, split: int = 4) -> NtStatus:
            return guest.open(Opening(0, gpadl, split))

        assert attempt(gpadl=9) is NtStatus.INVALID_HANDLE
        assert attempt(split=1) is NtStatus.INVALID_PARAMETER
        assert attempt(split=7) is NtStatus.INVALID_PARAMETER
        guest.host.gpadl_create(0, 2, [GpaRange(8000, 0, [BASE_PFN, BASE_PFN + 1])])
        assert attempt(gpadl=2) is NtStatus.INVALID_PARAMETER
        assert guest.host.device.events[-1] == "closed"  # type: ignore[attr-defined]
        assert attempt() is NtStatus.SUCCESS


def test_an_open_without_the_rings_memory_is_refused() -> None:
    host = DeviceHost(TestDevice())
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with pytest.raises(errors.GpadlUnknown) as caught:
        host.open_channel(Opening(0, 1, 2), fd, fd)
    assert caught.value.status is NtStatus.INVALID_HANDLE
    os.close(fd)
    with raw_channel(TestDevice()) as guest:
        guest.host.remove_region(BASE, guest.ram.regions[0].size)
        assert guest.open() is NtStatus.INVALID_PARAMETER


def test_close_drops_what_is_outstanding() -> None:
    packets: list[Packet] = []
    device = TestDevice(lambda _, packet: packets.append(packet))  # type: ignore[arg-type]
    with raw_channel(device) as guest:
        guest.send_direct(b"", [GpaRange.of_pages([BASE_PFN + 99])])
        eventually(lambda: packets)
        begin = time.monotonic()
        guest.host.close_channel(0)
        assert time.monotonic() - begin < 5
        assert packets[0].dropped
        assert packets[0].external_data is not None
        with pytest.raises(errors.ExternalDataClosed):
            packets[0].external_data.write(b"too late")
        packets[0].complete(b"nobody hears it")
        guest.expect_nothing()
        assert guest.host.memory.regions[0].users == 0


def test_what_was_taken_is_answered_when_the_connection_ends() -> None:
    """The guest keeps its channel open then, and waits for the next back end."""
    inside, leave = threading.Event(), threading.Event()

    def slow(_: Channel, packet: Packet) -> None:
        inside.set()
        leave.wait(10)
        packet.complete(packet.payload)

    for gather in (False, True):
        inside.clear()
        leave.clear()
        device = TestDevice(slow)  # type: ignore[arg-type]
        device.gather_completions = gather
        with raw_channel(device) as guest:
            for i in range(10):
                guest.ring.send(6, transaction_id=i, flags=1, publish=False).check()
            guest.ring.publish()  # one batch for the host
            guest.wake()
            assert inside.wait(5)
            closer = threading.Thread(target=guest.host.disconnect)
            closer.start()
            time.sleep(0.05)
            leave.set()
            closer.join(5)
            assert [p.transaction_id for p in guest.expect(10)] == list(range(10))


def test_suspended_is_the_time_to_complete() -> None:
    packets: list[Packet] = []

    class Completing(TestDevice):
        def suspended(self, channel: Channel) -> None:
            super().suspended(channel)
            for packet in packets:
                packet.complete()

    device = Completing(lambda _, packet: packets.append(packet))  # type: ignore[arg-type]
    with raw_channel(device) as guest:
        guest.send()
        eventually(lambda: packets)
        guest.host.close_channel(0)
        assert not packets[0].dropped


def test_close_waits_for_a_callback() -> None:
    inside, leave = threading.Event(), threading.Event()

    def slow(_: Channel, packet: object) -> None:
        inside.set()
        leave.wait(10)

    with raw_channel(TestDevice(slow)) as guest:
        guest.send()
        assert inside.wait(5)
        closer = threading.Thread(target=guest.host.close_channel, args=(0,))
        closer.start()
        time.sleep(0.1)
        assert closer.is_alive()
        leave.set()
        closer.join(5)
        assert not closer.is_alive()


def test_a_reset_forgets_channels_and_gpadls() -> None:
    device = TestDevice()
    with raw_channel(device) as guest:
        guest.host.reset()
        assert device.events[-1] == "closed"
        assert len(guest.host.gpadls) == 0
        assert len(guest.host.memory.regions) == 1
        guest.host.gpadl_create(0, guest.opening.gpadl_id, [GpaRange.of_pages(guest.pfns)])
        assert guest.open() is NtStatus.SUCCESS


def test_a_host_serves_one_front_end_after_the_other() -> None:
    host = DeviceHost(TestDevice())
    for payload in (b"first...", b"again..."):
        with raw_channel(host) as guest:
            guest.send(payload)
            assert guest.expect()[0].payload == payload
        assert host.memory.regions == ()
    host.close()


# -- asyncio -------------------------------------------------------------------------------------


class Sleepy(Device):
    """Completes later packets sooner."""

    class_id = CLASS_ID
    name = "sleepy"

    async def packet_received(self, channel: Channel, packet: Packet) -> None:
        await asyncio.sleep(packet.payload[0] / 100)
        if packet.payload[1]:
            raise RuntimeError("a bug")
        packet.complete(packet.payload)


def test_async_devices_complete_in_their_own_order() -> None:
    with raw_channel(Sleepy()) as guest:
        for delay in (100, 50, 0):
            guest.send(bytes([delay, 0]), transaction_id=delay)
        assert [p.transaction_id for p in guest.expect(3)] == [0, 50, 100]


def test_an_exception_in_a_coroutine_stops_the_channel() -> None:
    with raw_channel(Sleepy()) as guest:
        guest.send(b"\x00\x01")
        eventually(lambda: guest.channel.state is ChannelState.FAILED)
        assert guest.channel.stats.errors["DeviceException"] == 1


def test_close_cancels_coroutines() -> None:
    class Asleep(Sleepy):
        async def packet_received(self, channel: Channel, packet: Packet) -> None:
            await asyncio.sleep(1000)

    with raw_channel(Asleep()) as guest:
        guest.send()
        eventually(lambda: guest.channel.outstanding == 1)
        guest.host.close_channel(0)
        guest.expect_nothing()


# -- statistics ----------------------------------------------------------------------------------


def test_statistics_are_json() -> None:
    with raw_channel(TestDevice()) as guest:
        guest.send(b"x")
        guest.expect()
        stats = json.loads(json.dumps(guest.host.stats()))
        assert stats["class_id"] == str(CLASS_ID)
        assert stats["memory_bytes"] == guest.ram.regions[0].size
        (channel,) = stats["channels"]
        assert channel["packets_received"] == 1
        assert channel["ring"]["rx_size"] == 3 * 4096
        assert channel["errors"] == {}


def test_statistics_and_close_at_the_same_time() -> None:
    with raw_channel(TestDevice()) as guest:
        stop = threading.Event()
        failures: list[BaseException] = []

        def look() -> None:
            while not stop.is_set():
                try:
                    guest.host.stats()
                except Exception as error:
                    failures.append(error)
                    return

        thread = threading.Thread(target=look)
        thread.start()
        for _ in range(30):
            guest.host.close_channel(0)
            guest.resume()
        stop.set()
        thread.join()
        assert failures == []


def test_nothing_is_left_behind() -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with raw_channel(TestDevice()):
        pass
    before = count()
    for _ in range(5):
        with raw_channel(Sleepy()) as guest:
            guest.send(b"\0\0")
            guest.expect()
    assert count() == before
