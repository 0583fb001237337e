# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest loses its back end and finds it, or another one, again."""

from __future__ import annotations

import struct

import pytest

from tests.support.devices import Echo, GatheringEcho, Noting, Silent
from vhostvmbus.guest import CompletionTimeout, SoftwareGuest, serving
from vhostvmbus.vhost_user.errors import OfferChanged


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
