# SPDX-License-Identifier: GPL-2.0-or-later
"""Another back end takes a card over: the driver is brought to rest before the card goes."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from collections.abc import Iterator

import pytest

from tests.support.net_card import MAC, SocketLink, ethernet
from tests.support.waiting import StoppedClock, eventually
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import quiet
from vhostvmbus.devices.net import NetworkCard, leaving
from vhostvmbus.devices.net.takeover import BufferNote
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.errors import GuestSideError, ReceiveTimeout
from vhostvmbus.guest.netvsc import Netvsc
from vhostvmbus.wire.errors import ChannelClosed

DISCONNECTED = 0x4001000C
NOTE = 192
"""Offset of the note in a channel's part."""
REFUSED = 2


class Holding(NetworkCard):
    """Completes nothing any more once it is told so."""

    holding = False

    def hold(self) -> None:
        """From now on."""
        self.holding = True
        self._channels[0].set_plan(None)

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if not self.holding:
            super().packet_received(channel, packet)


@contextlib.contextmanager
def pumping(driver: Netvsc) -> Iterator[None]:
    """The guest takes what comes, as an interrupt would have it, until its channel is gone."""
    stop = threading.Event()

    def pump() -> None:
        with contextlib.suppress(GuestSideError, ChannelClosed):
            while not stop.is_set():
                with contextlib.suppress(ReceiveTimeout):
                    driver.pump(0.05)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_driver_is_told_and_what_it_sent_is_refused() -> None:
    first, second = Holding(SocketLink()), NetworkCard(SocketLink())
    with serving(second) as (_, path, host), SoftwareGuest.for_device(first) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        first.hold()
        sent = [driver.send(ethernet(b"lost")) for _ in range(20)]
        eventually(lambda: first._channels[0].outstanding == 20)
        gpadls = set(guest.gpadls)
        channel = driver.channel
        guest.reconnect(path)
        with pumping(driver):
            eventually(lambda: DISCONNECTED in driver.indications)
            assert [sending.wait() for sending in sent] == [REFUSED] * 20
            eventually(lambda: not gpadls & set(guest.gpadls))
        assert channel.stray_completions == []
        assert host.stats()["totals"]["packets_replayed"] == 20
        guest.wait_for_offer(0)
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert driver.send(ethernet(b"again")).wait() == 1
        guest.disconnect()
    first.close()
    second.close()


@pytest.mark.parametrize("frames", [0, 3])
def test_a_guest_that_is_stopped_keeps_its_time(
    monkeypatch: pytest.MonkeyPatch, frames: int
) -> None:
    """A minute passes: what lies in its receive buffer stays, and it gets the news when it goes
    on, and time for it."""
    clock = StoppedClock()
    link = SocketLink()
    first, second = NetworkCard(link), NetworkCard(SocketLink())
    with serving(second) as (_, path, _), SoftwareGuest.for_device(first) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        for number in range(frames):
            link.put(ethernet(b"unread %d" % number, to=MAC))
        eventually(lambda: frames == first.stats()["received"]["directed_frames"])
        gpadls = set(guest.gpadls)
        for module in (quiet, leaving):
            monkeypatch.setattr(module, "time", clock)
        guest.reconnect(path)

        def sent() -> bool:
            clock.tick(0.02)
            return driver.channel.ring.state.rx_available > 0

        eventually(sent)
        clock.pass_seconds(60)
        assert guest.channel_offers == []
        assert driver.send(ethernet(b"late")).wait() == REFUSED

        def gone() -> bool:
            clock.tick(0.05)
            with contextlib.suppress(ReceiveTimeout, ChannelClosed, GuestSideError):
                driver.pump(0.001)
            return not gpadls & set(guest.gpadls)

        eventually(gone)
        assert [frame.data for frame in driver.frames] == [
            ethernet(b"unread %d" % number, to=MAC) for number in range(frames)
        ]
        assert driver.indications == [DISCONNECTED]
        guest.disconnect()
    first.close()
    second.close()


def test_a_guest_that_is_stopped_does_not_hold_up_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever waits for it has nothing to wait for once the connection ends."""
    first, second = NetworkCard(SocketLink()), NetworkCard(SocketLink())
    with serving(second) as (_, path, _), SoftwareGuest.for_device(first) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        for module in (quiet, leaving):
            monkeypatch.setattr(module, "time", StoppedClock())
        guest.reconnect(path)
        eventually(lambda: second._channels)
        guest.disconnect()
        eventually(lambda: not second._channels)
    assert "left behind" not in caplog.text
    first.close()
    second.close()


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"x" * 16,
        struct.pack("<4sIIII", b"rbuf", 0x1234, 0xCAFE, 1728, 40),  # no such GPADL
        struct.pack("<4sIIII", b"rbuf", 0xE1E10, 0xCAFE, 1728, 40),  # the ring's
        struct.pack("<4sIIII", b"rbuf", 0xE1E11, 0xCAFE, 0, 40),
        struct.pack("<4sIIII", b"rbuf", 0xE1E11, 0xCAFE, 0xFFFFFFFF, 40),
        struct.pack("<4sIIII", b"rbuf", 0xE1E11, 0xCAFE, 1, 40),
        struct.pack("<4sIIII", b"rbuf", 0xE1E11, 0x1CAFE, 1728, 40),
        struct.pack("<4sIIII", b"rbuf", 0xE1E11, 0xCAFE, 1728, 41),
        bytes(256),
    ],
)
def test_a_note_may_be_anything(note: bytes) -> None:
    """The card goes and comes back all the same."""
    first, second = (NetworkCard(SocketLink()) for _ in range(2))
    with serving(second) as (_, path, _), SoftwareGuest.for_device(first) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        gpadls = set(guest.gpadls)
        guest.disconnect()
        assert guest._inflight is not None
        os.pwrite(guest._inflight.fd, struct.pack("<I", len(note)) + bytes(4) + note, NOTE)
        guest.reconnect(path)
        with pumping(driver):
            eventually(lambda: not gpadls & set(guest.gpadls))
        guest.wait_for_offer(0)
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert driver.send(ethernet(b"again")).wait() == 1
        guest.disconnect()
    first.close()
    second.close()


@pytest.mark.parametrize(
    ("buffer_id", "section_size", "message_size", "taken"),
    [
        (0xFFFF, 1728, 40, True),
        (0xCAFE, 1728, 28, True),
        (0x10000, 1728, 40, False),
        (0xCAFE, 1727, 40, False),
        (0xCAFE, 1, 40, False),  # thirty million sections
        (0xCAFE, 0, 40, False),
        (0xCAFE, 1728, 0, False),
        (0xCAFE, 1728, 0xFFFFFFFF, False),
    ],
)
def test_what_a_note_may_say(
    buffer_id: int, section_size: int, message_size: int, taken: bool
) -> None:
    note = BufferNote(0xE1E11, buffer_id, section_size, message_size)
    assert BufferNote.parse(note.pack()) == (note if taken else None)


def test_a_buffer_that_was_taken_back_is_forgotten() -> None:
    card = NetworkCard(SocketLink())
    with SoftwareGuest.for_device(card) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert driver.receive_gpadl is not None
        note = BufferNote.parse(card._channels[0].note)
        assert note == BufferNote(driver.receive_gpadl.gpadl_id, 0xCAFE, driver.receive_section, 40)
        driver.revoke(True)
        assert card._channels[0].note == b""
        guest.disconnect()
    card.close()


class Started(NetworkCard):
    """Says when it has done what comes after a start."""

    def __init__(self, link: SocketLink) -> None:
        super().__init__(link)
        self.taken_over = threading.Event()

    def post_started(self, channel: Channel) -> None:
        super().post_started(channel)
        if channel.info.resumed:
            self.taken_over.set()


def test_a_front_end_that_does_not_rescind_the_card() -> None:
    """The guest that is there has to load its driver again; the next one boots with a card."""
    first, second = NetworkCard(SocketLink()), Started(SocketLink())
    with serving(second) as (_, path, _):
        with SoftwareGuest.for_device(first, takes_offers=False) as guest:
            guest.enable(0)
            guest.reconnect(path)
            assert second.taken_over.wait(20)
        with SoftwareGuest.connect(path) as guest:
            driver = Netvsc(guest, guest.enable(0))
            driver.initialize()
            assert guest.channel_offers == []
    first.close()
    second.close()
