# SPDX-License-Identifier: GPL-2.0-or-later
"""In-band packets between the software guest and real devices."""

from __future__ import annotations

import struct
import threading
import time
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.devices import Backwards, Echo, GatheringEcho, HostPush, Silent
from tests.support.soak import examples
from tests.support.waiting import together
from vhostvmbus.guest import CompletionTimeout, ReceiveTimeout, RingFullTimeout, SoftwareGuest
from vhostvmbus.wire.errors import PacketTooBig


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

            @settings(max_examples=examples(200), deadline=None)
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
    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:

        def talk(number: int) -> None:
            for turn in range(200):
                payload = struct.pack("<QQ", number, turn)
                assert channel.send(payload) == payload

        together(*(partial(talk, number) for number in range(8)))


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
