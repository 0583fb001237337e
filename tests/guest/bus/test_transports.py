# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest's two transports, a socket and plain calls: a device and a guest see no
difference."""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from tests.support.devices import Digest, Echo, HostPush, Noting, Refusing, Silent, Touch
from tests.support.waiting import eventually, open_fds
from vhostvmbus.device import Channel, DeviceHost, Packet
from vhostvmbus.guest import (
    ChannelNotOpen,
    Disconnected,
    GuestRam,
    NotOffered,
    NtStatus,
    RequestRefused,
    SoftwareGuest,
)
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import FeatureMissing, OutOfOrder, WrongFdType
from vhostvmbus.wire.errors import OfferRefused
from vhostvmbus.wire.opening import Opening

Connect = Callable[..., AbstractContextManager[SoftwareGuest]]

BOTH: dict[str, Connect] = {"socket": SoftwareGuest.for_device, "direct": SoftwareGuest.direct}


@pytest.fixture(params=BOTH)
def connect(request: pytest.FixtureRequest) -> Connect:
    """The way in which a guest is connected to its device."""
    return BOTH[request.param]


class Growing(Noting):
    """Offers one more channel for each packet, and has them taken back for an empty one."""

    max_channels = 3

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if packet.payload:
            packet.complete(bytes(self.offer_channels(1)))
        else:
            self.rescind_channel(1)
            packet.complete()


# ---- alike ------------------------------------------------------------------------------


def test_offer_and_features(connect: Connect) -> None:
    with connect(Growing()) as guest:
        assert guest.offer is not None
        assert (guest.offer.class_id, guest.offer.max_channels) == (Growing.class_id, 3)
        assert guest.offer.user_defined == bytes(120)
        assert guest.front_end.features == (
            m.REQUIRED_FEATURES
            | m.ProtocolFeature.VMBUS_UNPLUG
            | m.ProtocolFeature.VMBUS_SUSPEND
            | m.ProtocolFeature.INFLIGHT_SHMFD
        )


def test_open_send_close(connect: Connect) -> None:
    device = Echo()
    with connect(device) as guest:
        free = guest.ram.free_page_count
        for number in range(3):
            with guest.open_channel(user_data=b"to opened()", target_vp=2) as channel:
                payload = struct.pack("<Q", number)
                assert channel.send(payload) == payload
                guest.move_interrupt(0, 1)
            opened = device.opened_channels[-1]
            assert opened.user_data == b"to opened()".ljust(120, b"\0")
            assert opened.target_vp == 1
        assert guest.ram.free_page_count == free
    assert device.events == ["opened 0", "suspended 0", "closed 0"] * 3


def test_external_pfns(connect: Connect) -> None:
    with connect(Digest()) as guest, guest.open_channel() as channel:
        pfns = guest.ram.alloc_pages(20)
        content = os.urandom(20 * 4096)
        guest.ram.write(pfns, content)
        assert channel.send_with_external_pfns(b"", pfns) == hashlib.sha256(content).digest()


def test_the_host_sends(connect: Connect) -> None:
    device = HostPush(5)
    with connect(device) as guest, guest.open_channel() as channel:
        for number in range(5):
            packet = channel.receive()
            assert packet.payload == struct.pack("<Q", number)
            packet.complete(packet.payload)
        for _ in range(5):
            assert device.answered.acquire(timeout=10)


def test_a_device_refuses_with_its_status(connect: Connect) -> None:
    with connect(Refusing()) as guest:
        free = guest.ram.free_page_count
        with pytest.raises(RequestRefused) as caught:
            guest.enable()
        assert (caught.value.request, caught.value.status) == ("Open", NtStatus.DEVICE_NOT_READY)
        assert guest.ram.free_page_count == free
        assert guest.gpadls == {}
        guest.enable()


def open_message(index: int, gpadl_id: int) -> m.Open:
    return m.Open(Opening(index, gpadl_id, 2))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (lambda _: (m.Close(0), []), NtStatus.INVALID_DEVICE_STATE),
        (lambda _: (m.Close(77), []), NtStatus.INVALID_PARAMETER),
        (lambda _: (m.GpadlTeardown(0, 0x666), []), NtStatus.INVALID_HANDLE),
        (lambda fd: (open_message(0, 0x666), [fd, fd]), NtStatus.INVALID_HANDLE),
        (lambda fd: (open_message(9, 0x666), [fd, fd]), NtStatus.INVALID_PARAMETER),
        # what the back end's session refuses before a device hears of it
        (
            lambda fd: (m.RemMemReg(m.MemoryRegion(1 << 40, 4096, 0, 0)), []),
            NtStatus.INVALID_PARAMETER,
        ),
        (
            lambda fd: (m.AddMemReg(m.MemoryRegion(4096, 4096, 0, 0)), [fd]),
            NtStatus.CONFLICTING_ADDRESSES,
        ),
        (
            lambda fd: (m.GpadlCreate(0, 1, 1, (4 << 20) + 8), [fd]),
            NtStatus.INSUFFICIENT_RESOURCES,
        ),
        # no memfd: the list of a GPADL cannot be in it
        (lambda fd: (m.GpadlCreate(0, 1, 1, 16), [fd]), NtStatus.INVALID_PARAMETER),
    ],
)
def test_requests_are_refused_with_the_same_status(
    connect: Connect, request_: Callable[[int], Any], status: NtStatus
) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    with connect(Echo()) as guest:
        message, fds = request_(fd)
        with pytest.raises(RequestRefused) as caught:
            guest.front_end.request(message, fds)
        assert caught.value.status == status
        os.eventfd_write(fd, 1)  # it is still the guest's
        with guest.open_channel() as channel:
            assert channel.send(b"all well") == b"all well"
    os.close(fd)


def test_without_memory_there_is_no_opening(connect: Connect) -> None:
    ram = GuestRam([(0, 1 << 20)])
    with connect(Echo(), ram=ram) as guest:
        guest.remove_memory(ram.regions[0])
        with pytest.raises(RequestRefused) as caught:
            guest.enable()
        assert caught.value.request == "GpadlCreate"
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        with pytest.raises(RequestRefused) as caught:
            guest.front_end.request(open_message(0, 1), [fd, fd])
        assert caught.value.status == NtStatus.INVALID_DEVICE_STATE
        os.close(fd)
        guest.set_memory_table(ram.regions)
        guest.enable()
    ram.close()


def test_what_no_front_end_sends(connect: Connect) -> None:
    with connect(Echo()) as guest, pytest.raises(OutOfOrder):
        guest.front_end.request(m.SetOwner())
    with connect(Echo()) as guest, pytest.raises(FeatureMissing):
        guest.front_end.request(m.SetCodeMap(8, ()), [0])
    with connect(Echo()) as guest, pytest.raises(ValueError, match="descriptors"):
        guest.front_end.request(m.Reset(), [0])


def test_close_with_packets_outstanding(connect: Connect) -> None:
    device = Silent()
    with connect(device) as guest:
        with guest.open_channel() as channel:
            pfns = guest.ram.alloc_pages(4)
            transactions = [channel.submit_with_external_pfns(b"", pfns) for _ in range(5)]
            for _ in transactions:
                assert device.arrived.acquire(timeout=10)
        for transaction in transactions:
            with pytest.raises(ChannelNotOpen):
                transaction.wait()
        assert all(packet.dropped for packet in device.packets)
        for packet in device.packets:
            packet.complete(b"to nobody")


def test_code_is_invalidated_before_the_completion(connect: Connect) -> None:
    seen: list[bool] = []
    asked = threading.Event()

    def look(_: object) -> None:
        assert asked.wait(10)
        seen.append(transaction.done or channel.ring.state.rx_available > 0)

    with (
        connect(Touch(), code_map=True, on_invalidate=look) as guest,
        guest.open_channel() as channel,
    ):
        pfns = guest.ram.alloc_pages(3)
        assert guest.code_map is not None
        guest.code_map.mark(pfns[1])
        transaction = channel.submit_with_external_pfns(struct.pack("<II", 0, 12288), pfns)
        asked.set()
        assert transaction.wait() == b"written."
        assert guest.invalidations == [((pfns[1] * 4096, 4096),)]
        assert seen == [False]


def test_an_invalidation_that_fails_ends_the_channel(connect: Connect) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("cannot")

    with connect(Touch(), code_map="unknown", on_invalidate=fail) as guest:
        channel = guest.enable()
        transaction = channel.submit_with_external_pfns(
            struct.pack("<II", 0, 8), guest.ram.alloc_pages(1)
        )
        assert guest.host is not None
        opened = guest.host.channels[0]
        eventually(lambda: opened.error is not None)
        assert type(opened.error).__name__ == "CodeInvalidationFailed"
        assert channel.ring.state.rx_available == 0
        assert not transaction.done


def test_subchannels_come_and_go(connect: Connect) -> None:
    device = Growing()
    with connect(device) as guest:
        with guest.open_channel() as primary:
            assert primary.send(b"one more")[:1] == b"\x01"
            guest.wait_for_offer(1)
            subchannel = guest.enable(1)
            assert subchannel.send(b"one more")[:1] == b"\x02"
            guest.wait_for_offer(2)
            guest.create_gpadl(3, channel=1)
            primary.send(b"")
            guest.wait_for_rescind(1)
            assert guest.offered == [0, 2]
            assert [gpadl.channel for gpadl in guest.gpadls.values()] == [0]
            with pytest.raises(ChannelNotOpen):
                subchannel.send(b"too late")
            with pytest.raises(NotOffered):
                guest.enable(1)
        assert guest.offered == [0]
        assert guest.channel_offers == [
            m.OfferChannel(1),
            m.OfferChannel(2),
            m.RescindChannel(1),
        ]


def test_a_front_end_that_takes_no_offers(connect: Connect) -> None:
    device = Growing()
    with connect(device, takes_offers=False), pytest.raises(OfferRefused) as caught:
        device.offer_channels(1)
    assert caught.value.status == NtStatus.NOT_SUPPORTED
    assert device.offers.offered == []


def test_unplug(connect: Connect) -> None:
    device = Echo()
    with connect(device) as guest:
        guest.enable()
        assert guest.unplug()
        assert (guest.channels, guest.gpadls, guest.offered) == ({}, {}, [])
        with pytest.raises(Disconnected):
            guest.front_end.request(m.Reset())
    assert device.events == ["opened 0", "suspended 0", "closed 0"]


def test_reset(connect: Connect) -> None:
    device = Echo()
    with connect(device) as guest:
        free = guest.ram.free_page_count
        guest.enable()
        guest.create_gpadl(5)
        guest.reset()
        assert guest.ram.free_page_count == free
        with guest.open_channel() as channel:
            assert channel.send(b"rebooted") == b"rebooted"


# ---- direct alone -----------------------------------------------------------------------


def test_what_was_in_flight_is_replayed_by_the_next_back_end() -> None:
    """From a socket to a call, and between two hosts."""
    silent, second, third = Silent(), Silent(), Echo()
    next_one, last = DeviceHost(second), DeviceHost(third)
    with SoftwareGuest.for_device(silent) as guest:
        channel = guest.enable()
        transactions = [channel.submit(struct.pack("<Q", number)) for number in range(3)]
        for _ in transactions:
            assert silent.arrived.acquire(timeout=10)
        guest.reconnect(next_one)
        for _ in transactions:
            assert second.arrived.acquire(timeout=10)
        second.packets[1].complete(b"the one.")
        assert transactions[1].wait() == b"the one."
        guest.reconnect(last)
        for number in (0, 2):
            assert transactions[number].wait() == struct.pack("<Q", number)
        assert channel.stray_completions == []
    next_one.close()
    last.close()


def test_requests_are_carried_out_on_the_callers_thread() -> None:
    threads: list[int] = []

    class Where(DeviceHost):
        def open_channel(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
            threads.append(threading.get_ident())
            super().open_channel(opening, kick_fd, call_fd)

    before = threading.active_count()
    with SoftwareGuest.direct(Where(Echo())) as guest:
        assert threading.active_count() == before
        guest.enable()
        assert threads == [threading.get_ident()]


def test_the_back_end_has_descriptors_of_its_own() -> None:
    """Those that came with a request are closed when it is done, whoever kept their numbers."""
    carried: list[int] = []

    class Forgetful(DeviceHost):
        def open_channel(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
            carried.extend((kick_fd, call_fd))
            assert {str(fd) for fd in carried} <= open_fds().keys()
            super().open_channel(opening, kick_fd, call_fd)

    host = Forgetful(Echo())
    with SoftwareGuest.direct(host) as guest:
        channel = guest.enable()
        assert {channel.kick_fd, channel.call_fd}.isdisjoint(carried)
        assert channel.send(b"8 bytes!") == b"8 bytes!"
    host.close()


def test_a_wrong_descriptor_is_raised_at_the_caller() -> None:
    """Over a socket it would end the session."""
    with SoftwareGuest.direct(Echo()) as guest:
        gpadl = guest.create_gpadl(4)
        fd = os.memfd_create("no eventfd", os.MFD_CLOEXEC)
        with pytest.raises(WrongFdType):
            guest.front_end.request(open_message(0, gpadl.gpadl_id), [fd, fd])
        os.close(fd)
        with guest.open_channel() as channel:
            assert channel.send(b"all well") == b"all well"


def test_nothing_goes_either_way_once_the_front_end_has_left() -> None:
    device = Growing()
    host = DeviceHost(device)
    with SoftwareGuest.direct(host) as guest:
        front_end = guest.front_end
        ask = host.invalidate
        assert ask is not None
        guest.disconnect()
        with pytest.raises(Disconnected):
            front_end.request(m.Reset())
        with pytest.raises(Disconnected):
            ask([(0, 4096)])
        assert host.invalidate is None
        assert guest.invalidations == []
        assert host.memory.regions == ()
        with pytest.raises(OfferRefused):
            device.offer_channels(1)
        front_end.close()  # again, for nothing
    host.close()
