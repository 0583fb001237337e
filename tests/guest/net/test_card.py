# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card as a guest's driver meets it: negotiation and RNDIS requests; no VM."""

from __future__ import annotations

import struct

import pytest

from tests.support.net_card import MAC, ethernet, rig
from tests.support.waiting import eventually
from vhostvmbus.guest import ReceiveTimeout
from vhostvmbus.guest.netvsc import RSC_CAPABLE, VERSIONS, VLAN_CAPABLE, Netvsc

# -- negotiation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_sends_and_receives(version: int) -> None:
    with rig() as r:
        r.driver.initialize(versions=[version])
        frame = ethernet(b"out" * 50)
        assert r.driver.send(frame).wait() == 1
        assert r.link.get().frame == frame
        back = ethernet(b"in" * 50, to=MAC)
        r.link.put(back)
        assert r.driver.receive().data == back
        assert r.card.stats()["errors"] == {}


def test_a_version_of_the_future_and_then_ours() -> None:
    with rig() as r:
        r.driver.initialize(versions=[0x70000, 0x60001])
        assert r.driver.version == 0x60001


def test_buffers_of_linuxs_size() -> None:
    with rig(ring_pages=(33, 33)) as r:
        r.driver.initialize(
            receive_bytes=16 << 20, send_bytes=1 << 20, capabilities=VLAN_CAPABLE | RSC_CAPABLE
        )
        assert (r.driver.receive_section, r.driver.receive_sections) == (13312, 1260)
        assert r.driver.send_section == 6144
        r.link.put(ethernet(b"x" * 1400, to=MAC))
        assert len(r.driver.receive().data) == 1414


def test_buffers_are_taken_back_and_lent_again() -> None:
    with rig() as r:
        r.driver.initialize()
        for receive in (True, False):
            r.driver.revoke(receive)
        assert r.driver.send(ethernet(), pages=True).wait() == 1  # needs no buffer
        r.link.get()
        r.driver.free_sections.append(0)
        r.link.put(ethernet(to=MAC))
        eventually(lambda: r.card.stats()["receive_filtered"] == 1)
        r.driver.lend_receive_buffer()
        r.driver.lend_send_buffer()
        assert r.driver.send(ethernet(b"again")).wait() == 1
        assert r.link.get().frame == ethernet(b"again")
        r.link.put(ethernet(b"again", to=MAC))
        assert r.driver.receive().data == ethernet(b"again", to=MAC)


def test_the_driver_goes_and_comes_back() -> None:
    with rig() as r:
        for round_ in range(5):
            r.driver.initialize(mtu=1500 if round_ % 2 else 9000)
            assert r.driver.send(ethernet(bytes([round_]) * 60)).wait() == 1
            assert r.link.get().frame[14] == round_
            r.driver.send_control(struct.pack("<III", 3, 12, 99))  # HALT
            r.driver.revoke(True)
            r.driver.revoke(False)
            r.guest.disable(0)
            assert r.card.adapter.packet_filter == 0
            r.link.put(ethernet(to=MAC))  # nobody takes it
            r.channel = r.guest.enable(0)
            r.driver = type(r.driver)(r.guest, r.channel)
        r.driver.initialize()
        r.link.put(ethernet(b"last", to=MAC))
        while r.driver.receive().data != ethernet(b"last", to=MAC):
            pass


def test_the_host_side_follows_the_guests_mtu() -> None:
    with rig() as r:
        for mtu, largest, expected in (
            (1500, 65521, 1500),
            (9000, 65521, 9000),
            (1400, 65521, 1500),
            (9000, 4000, 1500),
            (3000, 4000, 3000),
            (65521, 65521, 65521),
        ):
            r.link.largest_mtu = largest
            r.driver.initialize(mtu=mtu, receive_bytes=2 << 20)
            assert r.link.mtu == expected
            assert struct.unpack("<I", r.driver.query(0x00010106)) == (expected,)
            frame = ethernet(bytes(expected))
            assert r.driver.send(frame).wait() == 1
            assert r.link.get().frame == frame
            r.driver.revoke(True)
            r.driver.revoke(False)
        assert r.card.stats()["link"] == {"name": "test", "lost": 7}


# -- RNDIS requests --------------------------------------------------------------------------------


def test_requests_and_their_answers() -> None:
    with rig() as r:
        r.driver.initialize()
        assert r.driver.query(0x01010101) == MAC
        assert r.driver.try_query(0x00DEAD00) == (0xC00000BB, b"")
        assert r.driver.set(0x01010102, bytes.fromhex("020000000055")) == 0
        assert r.driver.query(0x01010102) == bytes.fromhex("020000000055")
        assert r.driver.set(0x01010102, b"\1") == 0xC0010014
        assert r.driver.request(8, b"") == (0, b"")
        assert r.driver.send_control(struct.pack("<III", 6, 12, 0)) == 1
        assert r.driver.answer(0) == (0, struct.pack("<I", 1))
        assert struct.unpack("<I", r.driver.query(0x0001010E)) == (0,)
        assert r.card.stats()["errors"] == {"OidUnknown": 1, "OidLengthInvalid": 1}


def test_a_request_may_come_in_a_send_section() -> None:
    with rig() as r:
        r.driver.initialize()
        message = struct.pack("<III", 8, 12, 77)
        assert r.driver._send(b"", message, channel_type=1).wait() == 1
        assert r.driver.answer(77) == (0, b"")


def test_many_requests_at_once_are_answered_in_order() -> None:
    with rig() as r:
        r.driver.initialize()
        r.driver.keep = True
        numbers = range(1000, 1030)
        under_way = [
            r.driver._send(struct.pack("<III", 8, 12, number), None, channel_type=1)
            for number in numbers
        ]
        assert [item.wait() for item in under_way] == [1] * 30
        for number in numbers:
            assert r.driver.answer(number) == (0, b"")
        assert len(r.driver.kept) == 30


def test_the_link_goes_down_and_up() -> None:
    with rig() as r:
        r.driver.initialize()
        assert struct.unpack("<I", r.driver.query(0x00010114)) == (0,)
        r.link.set_carrier(False)
        r.driver.pump()
        assert struct.unpack("<I", r.driver.query(0x00010114)) == (1,)
        r.link.set_carrier(True)
        r.link.set_carrier(True)
        r.driver.pump()
        assert r.driver.indications == [0x4001000C, 0x4001000B]
        with pytest.raises(ReceiveTimeout):
            r.driver.pump(0.05)
        r.link.put(ethernet(to=MAC))
        assert r.driver.receive().data == ethernet(to=MAC)


def test_the_link_changes_between_two_drivers() -> None:
    """The next one asks how the link is; before that it has no buffer for news."""
    with rig() as r:
        r.driver.initialize()
        r.guest.disable(0)
        r.link.set_carrier(False)
        driver = Netvsc(r.guest, r.guest.enable(0))
        driver.initialize()
        assert struct.unpack("<I", driver.query(0x00010114)) == (1,)
        with pytest.raises(ReceiveTimeout):
            driver.pump(0.1)
        assert driver.indications == []


def test_a_descriptor_that_vanishes_is_no_end() -> None:
    """What is behind the link's number is gone, and comes back; the world waits meanwhile."""
    with rig() as r:
        r.driver.initialize()
        r.link.ports[0].empty()
        r.link.set_carrier(False)
        r.link.put(ethernet(to=MAC))
        r.driver.pump()
        assert r.driver.send(ethernet(b"lost")).wait() == 1
        assert r.card.stats()["send_refused"] == 1
        with pytest.raises(ReceiveTimeout):
            r.driver.receive(0.1)
        r.link.ports[0].put(r.link.card[0].fileno())
        r.link.set_carrier(True)
        assert r.driver.receive().data == ethernet(to=MAC)
        assert r.driver.send(ethernet(b"again")).wait() == 1
        assert r.link.get().frame == ethernet(b"again")
