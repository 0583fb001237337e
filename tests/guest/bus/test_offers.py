# SPDX-License-Identifier: GPL-2.0-or-later
"""Offers that come and go: a device and a software guest over a real socket."""

import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.devices import Noting
from tests.support.waiting import eventually, together
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import DeviceHost
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.errors import ChannelNotOpen, NotOffered
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.wire.errors import OfferRefused, UsageError
from vhostvmbus.wire.ntstatus import NtStatus


class Growing(Noting):
    """Answers ``count`` with the indices of so many subchannels more, anything else with itself.

    ``hold`` is kept until the channel ends.
    """

    max_channels = 5

    def __init__(self) -> None:
        super().__init__()
        self.threads: dict[int, set[int]] = {}
        self.held = threading.Event()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        self.threads.setdefault(channel.index, set()).add(threading.get_ident())
        if packet.payload[:5] == b"count":
            indices = self.offer_channels(packet.payload[5])
            packet.complete(bytes(indices))
        elif packet.payload[:4] == b"hold":
            self.held.set()
        else:
            packet.complete(packet.payload)


@pytest.fixture
def device() -> Growing:
    return Growing()


@pytest.fixture
def guest(device: Growing) -> Iterator[SoftwareGuest]:
    with SoftwareGuest.for_device(device) as guest:
        yield guest


def count(number: int) -> bytes:
    return b"count" + bytes([number, 0, 0])


def test_subchannels_on_threads_of_their_own(device: Growing, guest: SoftwareGuest) -> None:
    """The device is asked for them by a packet, and asks the front end amid that packet."""
    with guest.open_channel() as primary:
        assert guest.offered == [0]
        assert primary.send(count(3))[:3] == bytes([1, 2, 3])
        for index in (1, 2, 3):
            guest.wait_for_offer(index)
        assert device.offers.offered == [1, 2, 3]
        subchannels = [guest.enable(index) for index in (3, 1, 2)]
        for number in range(100):
            payload = struct.pack("<Q", number)
            sent = [channel.submit(payload) for channel in (primary, *subchannels)]
            assert [transaction.wait() for transaction in sent] == [payload] * 4
        threads = [device.threads[index] for index in range(4)]
        assert [len(found) for found in threads] == [1] * 4
        assert len(set.union(*threads)) == 4
    assert guest.channels == {}
    assert guest.offered == [0]


def test_more_than_there_may_be(device: Growing, guest: SoftwareGuest) -> None:
    """All or nothing."""
    assert device.offer_channels(0) == []
    assert device.offer_channels(3) == [1, 2, 3]
    for number in (2, 65535, -1):
        with pytest.raises(OfferRefused) as caught:
            device.offer_channels(number)
        assert caught.value.status == NtStatus.INSUFFICIENT_RESOURCES
    assert device.offers.offered == [1, 2, 3]
    assert device.offer_channels(1) == [4]
    guest.wait_for_offer(4)
    assert guest.offered == [0, 1, 2, 3, 4]


def test_what_is_not_offered_is_not_opened(device: Growing, guest: SoftwareGuest) -> None:
    with pytest.raises(NotOffered):
        guest.enable(1)
    device.offer_channels(1)
    guest.wait_for_offer(1)
    device.rescind_channel(1)
    guest.wait_for_rescind(1)
    with pytest.raises(NotOffered):
        guest.enable(1)
    with pytest.raises(NotOffered):
        guest.wait_for_offer(1, 0.01)


def test_a_subchannel_is_taken_back(device: Growing, guest: SoftwareGuest) -> None:
    """With a packet in flight and a GPADL; the primary goes on; it may be offered again."""
    free = guest.ram.free_page_count
    with guest.open_channel() as primary:
        primary.send(count(2))
        guest.wait_for_offer(2)
        one, two = guest.enable(1), guest.enable(2)
        guest.create_gpadl(10, channel=1)
        waiting = one.submit(b"hold....")
        assert device.held.wait(10)
        device.rescind_channel(1)
        guest.wait_for_rescind(1)
        with pytest.raises(ChannelNotOpen):
            waiting.wait()
        assert device.events[-2:] == ["suspended 1", "closed 1"]
        assert guest.host is not None
        assert guest.host.stats()["gpadls"] == 2
        device.rescind_channel(1)
        for channel in (primary, two):
            assert channel.send(b"goes on.") == b"goes on."
        assert device.offers.offered == [2]
        assert device.offer_channels(1) == [1]
        guest.wait_for_offer(1)
        with guest.open_channel(1) as again:
            assert again.send(b"again...") == b"again..."
    assert guest.ram.free_page_count == free


def test_only_what_was_offered_later_is_taken_back(device: Growing, guest: SoftwareGuest) -> None:
    for index in (0, 5, -1):
        with pytest.raises(UsageError):
            device.rescind_channel(index)
    assert guest.channel_offers == []


def test_the_whole_device(device: Growing, guest: SoftwareGuest) -> None:
    """Every channel is closed, subchannels first; the device comes back."""
    free = guest.ram.free_page_count
    primary = guest.enable()
    primary.send(count(2))
    guest.wait_for_offer(2)
    guest.enable(1)
    guest.enable(2)
    guest.create_gpadl(5)
    waiting = primary.submit(b"hold....")
    assert device.held.wait(10)
    device.rescind()
    device.rescind()
    guest.wait_for_rescind(0)
    with pytest.raises(ChannelNotOpen):
        waiting.wait()
    assert [event for event in device.events if event.startswith("closed")] == [
        "closed 2", "closed 1", "closed 0",
    ]  # fmt: skip
    assert guest.offered == []
    assert guest.ram.free_page_count == free
    with pytest.raises(NotOffered):
        guest.enable()
    with pytest.raises(OfferRefused) as caught:
        device.offer_channels(1)
    assert caught.value.status == NtStatus.INVALID_DEVICE_STATE
    device.offer_again()
    guest.wait_for_offer(0)
    assert guest.offered == [0]
    with guest.open_channel() as channel:
        assert channel.send(count(1))[:1] == b"\1"
        guest.wait_for_offer(1)


def test_a_device_that_rescinds_itself_amid_a_packet() -> None:
    class Leaving(Noting):
        def packet_received(self, channel: Channel, packet: Packet) -> None:
            self.rescind()
            packet.complete(b"farewell")

    device = Leaving()
    with SoftwareGuest.for_device(device) as guest:
        guest.enable().submit(b"leave...")
        guest.wait_for_rescind(0)
        assert (guest.channels, guest.offered) == ({}, [])
        assert device.events[-1] == "closed 0"


def test_closing_the_primary_ends_subchannels(device: Growing, guest: SoftwareGuest) -> None:
    """A driver that is bound again gets new ones."""
    for _ in range(3):
        with guest.open_channel() as primary:
            assert primary.send(count(4))[:4] == bytes([1, 2, 3, 4])
            guest.wait_for_offer(4)
            guest.enable(4)
        assert (guest.offered, guest.channels) == ([0], {})
        assert device.offers.offered == []


def test_a_reset_ends_subchannels(device: Growing, guest: SoftwareGuest) -> None:
    guest.enable().send(count(2))
    guest.wait_for_offer(2)
    guest.enable(2)
    guest.reset()
    assert guest.offered == [0]
    assert device.offers.offered == []
    assert device.offer_channels(1) == [1]


def test_a_reset_does_not_bring_a_device_back(device: Growing, guest: SoftwareGuest) -> None:
    device.rescind()
    guest.wait_for_rescind(0)
    guest.reset()
    assert guest.offered == []


def test_another_back_end_learns_of_subchannels(device: Growing, guest: SoftwareGuest) -> None:
    """By their being resumed; those that the guest did not open it may offer again."""
    second = Growing()
    with serving(second) as (_, path, _):
        primary = guest.enable()
        primary.send(count(2))
        guest.wait_for_offer(2)
        sub = guest.enable(2)
        guest.reconnect(path)
        assert sub.send(b"goes on.") == primary.send(b"goes on.") == b"goes on."
        assert second.offers.offered == [2]
        assert device.offers.offered == []
        assert guest.offered == [0, 1, 2]
        assert second.offer_channels(3) == [1, 3, 4]
        guest.wait_for_offer(4)
        assert guest.offered == [0, 1, 2, 3, 4]
        guest.disconnect()


def test_a_rescinded_device_stays_so_for_the_next_front_end(device: Growing) -> None:
    host = DeviceHost(device)
    device.rescind()
    with serving(host) as (_, path, _):
        for _ in range(2):
            with SoftwareGuest.connect(path) as guest:
                guest.wait_for_rescind(0)
        device.offer_again()
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            assert channel.send(b"is there") == b"is there"
            assert guest.channel_offers == []
    host.close()


def test_a_front_end_that_cannot(device: Growing) -> None:
    with SoftwareGuest.for_device(device, takes_offers=False) as guest:
        for change in (lambda: device.offer_channels(2), device.rescind):
            with pytest.raises(OfferRefused) as caught:
                change()
            assert caught.value.status == NtStatus.NOT_SUPPORTED
        assert device.offers.offered == []
        with guest.open_channel() as channel:
            assert channel.send(b"is there") == b"is there"


def test_without_a_front_end(device: Growing) -> None:
    with pytest.raises(UsageError, match="nobody serves"):
        device.offer_channels(1)
    host = DeviceHost(device)
    with pytest.raises(OfferRefused) as caught:
        device.offer_channels(1)
    assert caught.value.status == NtStatus.DEVICE_NOT_CONNECTED
    with SoftwareGuest.for_device(host) as guest:
        guest.disconnect()
        eventually(lambda: host.offers.offer_channel is None)
        with pytest.raises(OfferRefused) as caught:
            device.offer_channels(1)
        assert caught.value.status == NtStatus.DEVICE_NOT_CONNECTED
    host.close()


def test_one_refused_of_several_takes_back_the_others(
    device: Growing, guest: SoftwareGuest
) -> None:
    asked: list[tuple[str, int]] = []

    def offer(index: int) -> None:
        asked.append(("offer", index))
        if index == 3:
            raise OfferRefused("no third one", NtStatus.INSUFFICIENT_RESOURCES)

    device.offers.offer_channel = offer
    device.offers.rescind_channel = lambda index: asked.append(("rescind", index))
    with pytest.raises(OfferRefused, match="no third one"):
        device.offer_channels(4)
    assert asked == [("offer", n) for n in (1, 2, 3)] + [("rescind", 1), ("rescind", 2)]
    assert device.offers.offered == []


def test_offers_from_many_threads(device: Growing, guest: SoftwareGuest) -> None:
    """No index is handed out twice."""
    found: list[int] = []

    def work() -> None:
        for _ in range(20):
            try:
                (index,) = device.offer_channels(1)
            except OfferRefused:
                continue
            found.append(index)
            assert found.count(index) == 1
            found.remove(index)
            device.rescind_channel(index)

    together(*[work] * 4)
    assert device.offers.offered == []
    eventually(lambda: guest.offered == [0])


def test_indices_that_there_are_not(device: Growing, guest: SoftwareGuest) -> None:
    """A back end that asks for nonsense is refused; the session goes on."""
    with guest.open_channel() as channel:
        change = device.offers.offer_channel
        assert change is not None
        for index in (5, 65535, 65536, 0xFFFFFFFF):
            with pytest.raises(OfferRefused) as caught:
                change(index)
            assert caught.value.status == NtStatus.INVALID_PARAMETER
        assert channel.send(b"goes on.") == b"goes on."
    assert all(isinstance(message, m.OfferChannel) for message in guest.channel_offers)


def test_what_the_front_end_refused_has_changed_nothing(device: Growing) -> None:
    """A device that could not be rescinded is on offer to the next front end."""
    host = DeviceHost(device)
    with serving(host) as (_, path, _):
        with SoftwareGuest.connect(path, takes_offers=False):
            with pytest.raises(OfferRefused):
                device.rescind()
            assert not device.offers.rescinded
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            assert channel.send(b"is there") == b"is there"
            assert guest.channel_offers == []
            assert device.offer_channels(1) == [1]
    host.close()
