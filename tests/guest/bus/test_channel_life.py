# SPDX-License-Identifier: GPL-2.0-or-later
"""Channels of the software guest are opened and closed, as they should and as they should not."""

from __future__ import annotations

import os
import struct
import threading

import pytest

from tests.support.devices import Echo, GatheringEcho, Refusing, Silent
from vhostvmbus.guest import ChannelNotOpen, GuestSideError, SoftwareGuest
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import vmbus_version


def test_what_an_opening_carries() -> None:
    device = Echo()
    with SoftwareGuest.for_device(device) as guest:
        version = vmbus_version(4, 1)
        user_data = bytes(range(120))
        with guest.open_channel(user_data=user_data, target_vp=3, version=version):
            (channel,) = device.opened_channels
            assert channel.user_data == user_data
            assert channel.vmbus_version == 4 << 16 | 1
            assert channel.target_vp == 3
            guest.move_interrupt(0, 1)
            assert channel.target_vp == 1
    assert device.events == ["opened 0", "suspended 0", "closed 0"]


def test_device_refuses_the_opening() -> None:
    device = Refusing()
    with SoftwareGuest.for_device(device) as guest:
        free = guest.ram.free_page_count
        with pytest.raises(RequestRefused) as caught:
            guest.enable()
        assert caught.value.status == NtStatus.DEVICE_NOT_READY
        assert guest.ram.free_page_count == free
        assert guest.gpadls == {}
        assert guest.host is not None
        assert guest.host.stats()["gpadls"] == 0
        with guest.open_channel() as channel:
            channel.send(b"")


@pytest.mark.parametrize("pages", [(1, 2), (2, 1), (0, 2), (1, 1)])
def test_rings_that_are_too_small(pages: tuple[int, int]) -> None:
    """The guest's own engine would refuse them as well, so they are asked for by hand."""
    with SoftwareGuest.for_device(Echo()) as guest:
        gpadl = guest.create_gpadl(sum(pages))
        message = m.Open(Opening(0, gpadl.gpadl_id, pages[0]))
        with pytest.raises(RequestRefused) as caught:
            _open_with_eventfds(guest, message)
        assert caught.value.status == NtStatus.INVALID_PARAMETER
        guest.delete_gpadl(gpadl)
        with guest.open_channel() as channel:
            channel.send(b"")


def _open_with_eventfds(guest: SoftwareGuest, message: m.Open) -> None:
    kick, call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
    try:
        guest.front_end.request(message, [kick, call])
    finally:
        os.close(kick)
        os.close(call)


def test_unknown_things_are_refused() -> None:
    with SoftwareGuest.for_device(GatheringEcho()) as guest:
        gpadl = guest.create_gpadl(4)
        for message in (
            m.Open(Opening(0, 0x666, 2)),
            m.Open(Opening(1, gpadl.gpadl_id, 2)),
            m.Open(Opening(3, gpadl.gpadl_id, 2)),
            m.Open(Opening(0, gpadl.gpadl_id, 3)),
        ):
            with pytest.raises(RequestRefused):
                _open_with_eventfds(guest, message)
        for request in (m.Close(0), m.Close(77), m.Modify(0, 1), m.GpadlTeardown(0, 0x666)):
            with pytest.raises(RequestRefused):
                guest.front_end.request(request)
        with pytest.raises(RequestRefused):
            guest.create_gpadl([5], gpadl_id=gpadl.gpadl_id)
        with guest.open_channel() as channel:
            assert channel.send(b"all well") == b"all well"


def test_a_channel_is_opened_once_at_a_time() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:
        with pytest.raises(GuestSideError):
            guest.enable()
        gpadl = guest.create_gpadl(4)
        with pytest.raises(RequestRefused) as caught:
            _open_with_eventfds(guest, m.Open(Opening(0, gpadl.gpadl_id, 2)))
        assert caught.value.status == NtStatus.INVALID_DEVICE_STATE
        assert channel.send(b"the same") == b"the same"


def test_open_and_close_again_and_again() -> None:
    device = Echo()
    with SoftwareGuest.for_device(device) as guest:
        free = guest.ram.free_page_count
        for number in range(20):
            with guest.open_channel() as channel:
                payload = struct.pack("<Q", number)
                assert channel.send(payload) == payload
            with pytest.raises(ChannelNotOpen):
                channel.send(b"")
        assert guest.ram.free_page_count == free
    assert device.events == ["opened 0", "suspended 0", "closed 0"] * 20


def test_close_with_packets_outstanding() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest:
        with guest.open_channel() as channel:
            pfns = guest.ram.alloc_pages(4)
            transactions = [channel.submit_with_external_pfns(b"", pfns) for _ in range(5)]
            for _ in transactions:
                assert device.arrived.acquire(timeout=10)
        for transaction in transactions:
            with pytest.raises(ChannelNotOpen):
                transaction.wait()
        for packet in device.packets:
            packet.complete(b"too late")  # dropped, and no error
        with guest.open_channel() as channel:
            transaction = channel.submit(b"afresh..")
            assert device.arrived.acquire(timeout=10)
            device.packets[-1].complete(b"answered")
            assert transaction.wait() == b"answered"
            assert channel.stray_completions == []


def test_a_waiting_thread_is_woken_by_the_close() -> None:
    device = Silent()
    caught: list[BaseException] = []
    with SoftwareGuest.for_device(device) as guest:
        channel = guest.enable()

        def wait() -> None:
            try:
                channel.send(b"")
            except ChannelNotOpen as error:
                caught.append(error)

        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
            assert device.arrived.acquire(timeout=10)
        guest.disable()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert len(caught) == 3


def test_tearing_down_the_ring_closes_the_channel() -> None:
    device = Echo()
    with SoftwareGuest.for_device(device) as guest:
        channel = guest.enable()
        (gpadl,) = guest.gpadls.values()
        channel.send(b"")
        guest.delete_gpadl(gpadl)
        assert device.events == ["opened 0", "suspended 0", "closed 0"]
        with pytest.raises(RequestRefused):
            guest.front_end.request(m.Close(0))
        guest.reset()


def test_reset() -> None:
    device = GatheringEcho()
    with SoftwareGuest.for_device(device) as guest:
        free = guest.ram.free_page_count
        first, second = guest.enable(0), guest.enable(1)
        guest.create_gpadl(10)
        assert first.send(b"chan0000") + second.send(b"chan0001") == b"chan0000chan0001"
        guest.reset()
        assert sorted(device.events[2:]) == ["closed 0", "closed 1", "suspended 0", "suspended 1"]
        assert guest.host is not None
        assert guest.host.stats()["gpadls"] == 0
        assert guest.ram.free_page_count == free
        with guest.open_channel() as channel:
            assert channel.send(b"rebooted") == b"rebooted"


def test_subchannels_are_independent() -> None:
    device = GatheringEcho()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel(0) as primary:
        assert device.offer_channels(1) == [2]
        guest.wait_for_offer(2)
        sub = guest.enable(2)
        for number in range(50):
            payload = struct.pack("<Q", number)
            assert primary.send(payload) == sub.send(payload) == payload
        guest.disable(2)
        assert primary.send(b"alone...") == b"alone..."
