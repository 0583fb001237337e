# SPDX-License-Identifier: GPL-2.0-or-later
"""Channels between the software guest and real devices: in-band packets and the life cycle."""

from __future__ import annotations

import os
import struct
import threading
import time

import pytest
from guest_test_devices import (
    Backwards,
    Echo,
    GatheringEcho,
    HostPush,
    Noting,
    Refusing,
    Silent,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostvmbus.guest import (
    ChannelNotOpen,
    CompletionTimeout,
    GuestSideError,
    ReceiveTimeout,
    RingFullTimeout,
    SoftwareGuest,
    serving,
)
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import OfferChanged, RequestRefused
from vhostvmbus.wire.errors import PacketTooBig
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import vmbus_version


def test_offer() -> None:
    with SoftwareGuest.for_device(GatheringEcho()) as guest:
        assert guest.offer is not None
        assert guest.offer.class_id == Echo.class_id
        assert (guest.offer.channels, guest.offer.max_channels) == (2, 3)


@pytest.mark.parametrize("device", [Echo, GatheringEcho])
@pytest.mark.parametrize("size", [0, 8, 64, 4096, 4097, 60000])
def test_echo(device: type[Echo], size: int) -> None:
    payload = bytes(i * 7 & 0xFF for i in range(size))
    with SoftwareGuest.for_device(device()) as guest, guest.open_channel() as channel:
        padded = payload + bytes(-size % 8)
        assert channel.send(payload) == padded
        assert channel.send(payload) == padded
        assert channel.in_flight == 0


def test_echo_of_anything() -> None:
    """Payloads of every size, so that packets wrap at every 8-byte offset of a small ring."""
    with SoftwareGuest.for_device(Echo()) as guest:
        with guest.open_channel(ring_pages=(2, 2)) as channel:

            @settings(max_examples=200, deadline=None)
            @given(st.lists(st.binary(max_size=600), max_size=20))
            def echo(payloads: list[bytes]) -> None:
                transactions = [channel.submit(payload) for payload in payloads]
                for payload, transaction in zip(payloads, transactions, strict=True):
                    assert transaction.wait() == payload + bytes(-len(payload) % 8)

            echo()
        assert channel.stray_completions == []


@pytest.mark.parametrize("size", range(8, 80, 8))
def test_wrap_at_every_offset(size: int) -> None:
    with (
        SoftwareGuest.for_device(GatheringEcho()) as guest,
        guest.open_channel(ring_pages=(2, 2)) as channel,
    ):
        for number in range(600):
            payload = struct.pack("<Q", number) * (size // 8)
            assert channel.send(payload) == payload


@pytest.mark.parametrize(
    "pages", [(2, 2), (3, 2), (2, 3), (17, 17), (64, 5), (513, 513), (1025, 1025)]
)
@pytest.mark.parametrize("scattered", [False, True])
def test_ring_sizes(pages: tuple[int, int], scattered: bool) -> None:
    with (
        SoftwareGuest.for_device(Echo()) as guest,
        guest.open_channel(ring_pages=pages, scattered=scattered) as channel,
    ):
        state = channel.ring.state
        assert (state.tx_size, state.rx_size) == ((pages[0] - 1) * 4096, (pages[1] - 1) * 4096)
        transactions = [channel.submit(struct.pack("<Q", i) * 16) for i in range(500)]
        for number, transaction in enumerate(transactions):
            assert transaction.wait() == struct.pack("<Q", number) * 16


def test_largest_packet_of_a_ring() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel(ring_pages=(3, 3)) as c:
        # descriptor, trailer, and the 8 bytes that tell a full ring from an empty one
        payload = bytes(range(256)) * 32
        largest = payload[: 8192 - 16 - 8 - 8]
        assert c.send(largest) == largest
        with pytest.raises(PacketTooBig):
            c.send(payload[: 8192 - 16 - 8])
        assert c.send(b"goes on.") == b"goes on."


def test_without_waiting_nothing_comes_back() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        assert channel.send(b"one-way.", wait=False) == b""
        assert device.arrived.acquire(timeout=10)
        (packet,) = device.packets
        assert packet.payload == b"one-way."
        assert not packet.completion_requested
        packet.complete(b"not sent")
        with pytest.raises(ReceiveTimeout):
            channel.receive(timeout=0.1)
        assert channel.stray_completions == []


def test_order_of_packets_is_kept_when_the_ring_is_full() -> None:
    """Many times what both rings hold, sent before anything is read."""
    device = Silent()
    device.transaction_quota = 100000
    count = 2000
    with SoftwareGuest.for_device(device) as guest, guest.open_channel(ring_pages=(2, 2)) as c:
        transactions = [c.submit(struct.pack("<Q", i) * 8) for i in range(count)]
        for _ in range(count):
            assert device.arrived.acquire(timeout=10)
        assert [struct.unpack("<Q", p.payload[:8])[0] for p in device.packets] == list(range(count))

        def complete_all() -> None:
            for packet in device.packets:
                packet.complete(packet.payload[:8])

        completer = threading.Thread(target=complete_all)
        completer.start()
        for number, transaction in enumerate(transactions):
            assert transaction.wait() == struct.pack("<Q", number)
        completer.join()


def test_ring_that_stays_full() -> None:
    device = Silent()
    device.transaction_quota = 1
    with SoftwareGuest.for_device(device) as guest, guest.open_channel(ring_pages=(2, 2)) as c:
        sent = [c.submit(bytes(1000)) for _ in range(4)]
        with pytest.raises(RingFullTimeout):
            sent += [c.submit(bytes(1000), timeout=0.2) for _ in range(2)]
        assert c.in_flight == 4
        for _ in sent:
            assert device.arrived.acquire(timeout=10)
            device.packets[-1].complete()
        for transaction in sent:
            transaction.wait()


def test_completions_in_another_order() -> None:
    with SoftwareGuest.for_device(Backwards()) as guest, guest.open_channel() as channel:
        for group in (1, 2, 7, 64):
            transactions = [
                channel.submit(struct.pack("<QQ", group - 1 - i, i)) for i in range(group)
            ]
            for number, transaction in enumerate(transactions):
                assert struct.unpack("<QQ", transaction.wait())[1] == number


def test_transaction_ids_reach_the_device() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        transactions = [channel.submit(b"") for _ in range(3)]
        for _ in transactions:
            assert device.arrived.acquire(timeout=10)
        ids = [transaction.transaction_id for transaction in transactions]
        assert [packet.transaction_id for packet in device.packets] == ids
        assert len(set(ids)) == 3
        for packet in device.packets:
            packet.complete()


def test_time_out_then_completion() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        transaction = channel.submit(b"patience")
        started = time.monotonic()
        with pytest.raises(CompletionTimeout):
            transaction.wait(timeout=0.2)
        assert 0.15 < time.monotonic() - started < 5
        assert not transaction.done
        assert channel.in_flight == 1
        assert device.arrived.acquire(timeout=10)
        device.packets[0].complete(b"at last!")
        assert transaction.wait() == b"at last!"


def test_many_threads_share_a_channel() -> None:
    errors: list[BaseException] = []
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:

        def talk(number: int) -> None:
            try:
                for turn in range(200):
                    payload = struct.pack("<QQ", number, turn)
                    assert channel.send(payload) == payload
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert errors == []


def test_changing_the_buffer_after_the_send_changes_nothing() -> None:
    device = Silent()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        buffer = bytearray(b"original")
        transaction = channel.submit(buffer)
        buffer[:] = b"tampered"
        assert device.arrived.acquire(timeout=10)
        assert device.packets[0].payload == b"original"
        device.packets[0].complete()
        transaction.wait()


# ---- packets from the host --------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 100, 3000])
def test_host_sends_guest_completes(count: int) -> None:
    """3000 packets do not fit into the ring."""
    device = HostPush(count)
    with SoftwareGuest.for_device(device) as guest, guest.open_channel(ring_pages=(3, 3)) as c:
        for number in range(count):
            packet = c.receive()
            assert packet.payload == struct.pack("<Q", number)
            assert packet.completion_requested
            packet.complete(packet.payload * 2)
        with pytest.raises(RuntimeError):
            packet.complete()
        for _ in range(count):
            assert device.answered.acquire(timeout=10)
    assert device.answers == [struct.pack("<QQ", i, i) for i in range(count)]


def test_host_packet_that_the_guest_never_completes() -> None:
    device = HostPush()
    with SoftwareGuest.for_device(device) as guest, guest.open_channel() as channel:
        channel.receive()
        with pytest.raises(ReceiveTimeout):
            channel.receive(timeout=0.05)
    assert device.answers == [None]


# ---- opening and closing ----------------------------------------------------------------


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
        message = m.Open(0, gpadl.gpadl_id, pages[0], 0, 0, 0, bytes(120))
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
            m.Open(0, 0x666, 2, 0, 0, 0, bytes(120)),
            m.Open(1, gpadl.gpadl_id, 2, 0, 0, 0, bytes(120)),
            m.Open(3, gpadl.gpadl_id, 2, 0, 0, 0, bytes(120)),
            m.Open(0, gpadl.gpadl_id, 3, 0, 0, 0, bytes(120)),
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
            _open_with_eventfds(guest, m.Open(0, gpadl.gpadl_id, 2, 0, 0, 0, bytes(120)))
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


# ---- losing the back end ----------------------------------------------------------------


def test_reconnect_while_open() -> None:
    """A packet that waits in the ring is served by the next back end; no opening is seen."""
    first, second = Echo(), Echo()
    with SoftwareGuest.for_device(first) as guest, serving(second) as (_, path, _):
        channel = guest.enable()
        assert channel.send(b"the one.") == b"the one."
        guest.disconnect()
        waiting = channel.submit(b"patient.")
        with pytest.raises(CompletionTimeout):
            waiting.wait(timeout=0.1)
        guest.reconnect(path)
        assert waiting.wait() == b"patient."
        for number in range(2000):
            payload = struct.pack("<Q", number)
            assert channel.send(payload) == payload
        guest.disable()
        guest.disconnect()
    assert first.events == ["opened 0", "suspended 0", "closed 0"]
    assert second.events == ["resumed 0", "suspended 0", "closed 0"]


def test_reconnections_under_load() -> None:
    """Packets that were completed, or not yet taken, survive; nothing is answered twice."""
    with serving(Echo()) as (server, path, _), SoftwareGuest.connect(path) as guest:
        channel = guest.enable()
        answered = 0
        for turn in range(20):
            payloads = [struct.pack("<QQ", turn, i) for i in range(100)]
            transactions = [channel.submit(payload) for payload in payloads]
            guest.reconnect(path)
            assert channel.send(b"goes on.") == b"goes on."
            # The device keeps the order: what has no completion by now was taken and is lost.
            for payload, transaction in zip(payloads, transactions, strict=True):
                if transaction.done:
                    assert transaction.wait() == payload
                    answered += 1
        assert answered > 1000
        assert channel.stray_completions == []
        assert server.protocol_errors == 0


def test_what_the_lost_back_end_had_taken_is_lost_without_a_region() -> None:
    device, next_one = Silent(), Echo()
    with (
        SoftwareGuest.for_device(device, inflight=False) as guest,
        serving(next_one) as (_, path, _),
    ):
        channel = guest.enable()
        taken = channel.submit(b"taken...")
        assert device.arrived.acquire(timeout=10)
        guest.reconnect(path)
        assert channel.send(b"goes on.") == b"goes on."
        assert not taken.done
        with pytest.raises(CompletionTimeout):
            taken.wait(timeout=0.05)
        assert channel.stray_completions == []
        guest.disconnect()


def test_reconnect_to_the_same_server_many_times() -> None:
    device = Echo()
    with serving(device) as (server, path, _):
        with SoftwareGuest.connect(path) as guest:
            channel = guest.enable()
            for number in range(10):
                guest.reconnect(path)
                payload = struct.pack("<Q", number)
                assert channel.send(payload) == payload
        assert server.connections == 11
    assert device.events.count("resumed 0") == 10


def test_the_offer_has_to_stay_the_same() -> None:
    with SoftwareGuest.for_device(Echo()) as guest, serving(GatheringEcho()) as (_, path, _):
        with pytest.raises(OfferChanged):
            guest.reconnect(path)
        guest.disconnect()


def test_front_end_vanishes_with_packets_outstanding() -> None:
    device = Silent()
    with serving(device) as (server, path, _):
        with SoftwareGuest.connect(path) as guest:
            channel = guest.enable()
            channel.submit(b"")
            assert device.arrived.acquire(timeout=10)
        with SoftwareGuest.connect(path) as guest, guest.open_channel() as channel:
            device.packets[0].complete()
            transaction = channel.submit(b"next one")
            assert device.arrived.acquire(timeout=10)
            device.packets[1].complete(b"served..")
            assert transaction.wait() == b"served.."
        assert server.protocol_errors == 0
    assert device.events.count("closed 0") == 2


def test_memory_in_a_table() -> None:
    with (
        SoftwareGuest.for_device(Echo(), ram_in_table=True) as guest,
        guest.open_channel() as channel,
    ):
        assert channel.send(b"tabular.") == b"tabular."
        region = guest.ram.add(0x2_0000_0000, 1 << 20)
        guest.set_memory_table(guest.ram.regions)
        assert channel.send(b"hot-plug") == b"hot-plug"
        guest.set_memory_table([r for r in guest.ram.regions if r is not region])
        guest.ram.remove(region)
        assert channel.send(b"unplug..") == b"unplug.."


def test_a_device_without_traffic() -> None:
    device = Noting()
    with SoftwareGuest.for_device(device):
        pass
    assert device.events == []
