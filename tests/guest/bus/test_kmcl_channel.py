# SPDX-License-Identifier: GPL-2.0-or-later
"""KMCL's channel, both endpoints, over a real socket: names, contexts, control, the end."""

from __future__ import annotations

import threading
from uuid import UUID

import pytest

from tests.support.devices import CLASS_ID, Echo, HostPush, Noting, Silent
from tests.support.waiting import eventually
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import DeviceHost
from vhostvmbus.guest import CompletionTimeout, NoSuchDevice, SoftwareGuest, serving
from vhostvmbus.wire.errors import AlreadyCompleted
from vhostvmbus.wire.ntstatus import NtStatus

INSTANCE = UUID("1f0a1c0e-5b6e-4a56-8f25-0b7d0f6f5f01")


def opened(guest: SoftwareGuest) -> Channel:
    """The host's end of channel 0."""
    assert guest.host is not None
    return guest.host.channels[0]


def test_a_client_names_what_it_wants() -> None:
    """No instance: any of that type. What is not there is an error, and leaves nothing behind."""
    device = Echo()
    device.instance_id = INSTANCE
    with serving(device) as (server, path, _):
        for wanted in ({}, {"class_id": CLASS_ID}, {"class_id": CLASS_ID, "instance_id": INSTANCE}):
            with SoftwareGuest.connect(path, **wanted) as guest:
                assert guest.offer is not None
                assert guest.offer.instance_id == INSTANCE
        for wanted in ({"class_id": INSTANCE}, {"class_id": CLASS_ID, "instance_id": CLASS_ID}):
            with pytest.raises(NoSuchDevice) as caught:
                SoftwareGuest.connect(path, **wanted)
            assert caught.value.status is NtStatus.NO_SUCH_DEVICE
        assert server.protocol_errors == 0


def test_the_friendly_name_is_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    names: list[str] = []

    class Named(Noting):
        name = "my gadget"

        def packet_received(self, channel: Channel, packet: Packet) -> None:
            names.append(threading.current_thread().name)
            raise RuntimeError("a bug")

    with SoftwareGuest.for_device(Named()) as guest, guest.open_channel() as channel:
        channel.submit(b"")
        eventually(lambda: "a bug" in caplog.text)
        assert names == ["my gadget/0"]
        assert "my gadget/0" in caplog.text
        assert guest.host is not None
        assert guest.host.stats()["name"] == "my gadget"


def test_devices_keep_what_they_like_on_channels_and_packets() -> None:
    """KMCL's contexts: plain attributes."""

    class Counting(Noting):
        def opened(self, channel: Channel) -> None:
            channel.count = 0  # type: ignore[attr-defined]

        def packet_received(self, channel: Channel, packet: Packet) -> None:
            channel.count += 1  # type: ignore[attr-defined]
            packet.note = b"%d packet" % channel.count  # type: ignore[attr-defined]
            threading.Thread(target=lambda: packet.complete(packet.note)).start()  # type: ignore[attr-defined]

    with SoftwareGuest.for_device(Counting()) as guest:
        for _ in range(2):  # each opening is a channel of its own
            with guest.open_channel() as channel:
                assert [channel.send(b"") for _ in range(2)] == [b"1 packet", b"2 packet"]


def test_mmio_and_flags_reach_the_guest() -> None:
    device = Echo()
    device.mmio_megabytes, device.channel_flags, device.user_defined = 64, 0x10, b"bytes"
    with SoftwareGuest.for_device(device) as guest:
        assert guest.offer is not None
        assert guest.offer.mmio_megabytes == 64
        assert guest.offer.channel_flags == 0x10
        assert guest.offer.user_defined == b"bytes".ljust(120, b"\0")


def test_pause_and_start_under_a_guest_that_sends() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:
        channel.send(b"")
        opened(guest).pause(10)
        waiting = [channel.submit(b"%08d" % n) for n in range(20)]
        with pytest.raises(CompletionTimeout):
            waiting[0].wait(0.1)
        opened(guest).start()
        assert [t.wait() for t in waiting] == [b"%08d" % n for n in range(20)]


def test_quota_lowered_below_what_is_outstanding() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        sent = [channel.submit(b"%08d" % n) for n in range(8)]
        for _ in sent:
            assert device.arrived.acquire(timeout=10)
        opened(guest).transaction_quota = 2
        sent.append(channel.submit(b"one more"))
        for packet in device.packets[:6]:
            packet.complete()
        assert not device.arrived.acquire(timeout=0.1)  # two are outstanding
        device.packets[6].complete()
        assert device.arrived.acquire(timeout=10)
        for packet in device.packets[7:]:
            packet.complete()
        for transaction in sent:
            assert transaction.wait() == b""


def test_a_deferred_packet_is_overtaken() -> None:
    release = threading.Event()

    class Deferring(Noting):
        def packet_received(self, channel: Channel, packet: Packet) -> None:
            if packet.payload == b"slow one" and not packet.deferred:
                packet.defer()
                return
            if packet.deferred:
                release.wait(10)
            packet.complete(packet.payload)

    with SoftwareGuest.for_device(Deferring()) as guest, guest.open_channel() as channel:
        slow = channel.submit(b"slow one")
        assert channel.send(b"fast one") == b"fast one"
        assert not slow.done
        release.set()
        assert slow.wait() == b"slow one"
        assert slow.place == 1


def test_completing_twice_sends_nothing() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        transaction = channel.submit_with_external_pfns(b"", guest.ram.alloc_pages(2))
        assert device.arrived.acquire(timeout=10)
        (packet,) = device.packets
        packet.complete(b"the one.")
        with pytest.raises(AlreadyCompleted):
            packet.complete(b"another.")
        with pytest.raises(AlreadyCompleted):
            packet.fail("too late")
        assert transaction.wait() == b"the one."
        follow_up = channel.submit(b"")
        assert device.arrived.acquire(timeout=10)
        device.packets[1].complete()
        follow_up.wait()
        assert channel.stray_completions == []


def test_fail_stops_the_channel_until_it_is_opened_again() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest:
        with guest.open_channel() as channel:
            transaction = channel.submit(b"")
            assert device.arrived.acquire(timeout=10)
            device.packets[0].fail("beyond repair")
            channel.submit(b"unheard.")
            assert not device.arrived.acquire(timeout=0.1)
            assert not transaction.done
        with guest.open_channel() as channel:
            transaction = channel.submit(b"")
            assert device.arrived.acquire(timeout=10)
            device.packets[1].complete(b"anew....")
            assert transaction.wait() == b"anew...."
    assert device.events == ["opened 0", "suspended 0", "closed 0"] * 2


def test_the_host_goes_with_packets_outstanding() -> None:
    """In KMCL's order: suspended, then completed or taken away, then closed."""
    device = Silent()
    host = DeviceHost(device)
    with SoftwareGuest.for_device(host) as guest:
        channel = guest.enable()
        pfns = guest.ram.alloc_pages(4)
        for _ in range(3):
            channel.submit_with_external_pfns(b"", pfns)
            assert device.arrived.acquire(timeout=10)
        host.close()
        assert [packet.dropped for packet in device.packets] == [True] * 3
        assert device.events == ["opened 0", "suspended 0", "closed 0"]
        for packet in device.packets:
            packet.complete(b"too late")  # dropped, and no error


def test_the_whole_order_of_callbacks() -> None:
    events: list[str] = []

    class Ordered(Noting):
        def opened(self, channel: Channel) -> None:
            events.append("opened")

        def started(self, channel: Channel) -> None:
            events.append("started")
            channel.send(b"queued..", on_completion=lambda answer: events.append(f"{answer!r}"))

        def post_started(self, channel: Channel) -> None:
            events.append("post_started")
            assert channel.request(b"waiting.", 10) == b"answered"
            events.append("answered")

        def packet_received(self, channel: Channel, packet: Packet) -> None:
            events.append("packet_received")
            packet.complete()

        def processing_complete(self, channel: Channel, count: int) -> None:
            events.append(f"processing_complete {count}")

        def suspended(self, channel: Channel) -> None:
            events.append("suspended")

        def closed(self, channel: Channel) -> None:
            events.append("closed")

    with SoftwareGuest.for_device(Ordered()) as guest, guest.open_channel() as channel:
        assert channel.receive().payload == b"queued.."  # never completed
        channel.receive().complete(b"answered")
        eventually(lambda: "answered" in events)
        channel.send(b"a packet")
        eventually(lambda: "processing_complete 1" in events[-1:])
    assert events[:2] == ["opened", "started"]
    assert events.index("post_started") < events.index("answered")
    assert events.index("packet_received") < events.index("suspended")
    assert events[-3:] == ["suspended", "None", "closed"]


def test_a_host_packet_is_not_completed_when_the_channel_closes() -> None:
    device = HostPush(5)
    with SoftwareGuest.for_device(device) as guest:
        with guest.open_channel() as channel:
            channel.receive().complete(b"answered")
            assert device.answered.acquire(timeout=10)
        assert device.answers == [b"answered", None, None, None, None]
