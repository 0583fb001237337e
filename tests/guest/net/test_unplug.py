# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card is unplugged under traffic: its driver is brought to rest before it goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.support.net_card import MAC, SocketLink, ethernet
from tests.support.waiting import StoppedClock, eventually, in_thread
from vhostvmbus.device import quiet
from vhostvmbus.devices.net import NetworkCard, leaving
from vhostvmbus.guest import ChannelNotOpen, SoftwareGuest, serving
from vhostvmbus.guest.errors import GuestSideError, ReceiveTimeout
from vhostvmbus.guest.netvsc import Netvsc
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import Disconnected
from vhostvmbus.wire.errors import ChannelClosed

DISCONNECTED = 0x4001000C
CONNECT_STATUS = 0x00010114
"""``OID_GEN_MEDIA_CONNECT_STATUS``: 0 is connected."""
REACTION = 0.3
"""Seconds in which the guest of these tests acts on a change of its link."""


@pytest.fixture(autouse=True)
def _sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes as long as Linux may."""
    monkeypatch.setattr(leaving, "LINK_CHANGE_SECONDS", 2 * REACTION)
    monkeypatch.setattr(quiet, "CALM_SECONDS", 0.1)


@dataclass
class Driver:
    """A driver that sends all the time while it has a link, and, as Linux, waits for the completion
    of all that it sent before it lets go of its channel."""

    netvsc: Netvsc
    obeys: bool = True
    sent: int = 0
    completed: int = 0
    received: int = 0
    turns: int = 0
    error: list[BaseException] = field(default_factory=list)

    def run(self, over: threading.Event) -> None:
        under_way = []
        stop_at = float("inf")
        try:
            while not over.is_set():
                if DISCONNECTED in self.netvsc.indications and stop_at == float("inf"):
                    stop_at = time.monotonic() + REACTION
                if not self.obeys or time.monotonic() < stop_at:
                    under_way.append(self.netvsc.send(ethernet(b"%d" % self.sent)))
                    self.sent += 1
                with contextlib.suppress(ReceiveTimeout):
                    self.netvsc.pump(0.001)
                if self.netvsc.frames:
                    self.received += len(self.netvsc.frames)
                    self.netvsc.frames.clear()
                self.turns += 1
                while under_way and under_way[0].transaction.done:
                    assert under_way.pop(0).wait() == 1
                    self.completed += 1
        except (GuestSideError, ChannelClosed, Disconnected):
            return  # the channel was taken
        except BaseException as error:
            self.error.append(error)


@contextlib.contextmanager
def busy(guest: SoftwareGuest, link: SocketLink, *, obeys: bool = True) -> Iterator[Driver]:
    """Traffic both ways over a card that has just been opened."""
    netvsc = Netvsc(guest, guest.enable(0))
    netvsc.initialize()
    driver, over = Driver(netvsc, obeys), threading.Event()

    def world() -> None:
        link.world[0].settimeout(0.001)
        while not over.is_set():
            with contextlib.suppress(BlockingIOError, TimeoutError):
                link.put(ethernet(b"from the world", to=MAC))
            with contextlib.suppress(TimeoutError):
                link.world[0].recv(4096)

    threads = [threading.Thread(target=driver.run, args=(over,)), threading.Thread(target=world)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: driver.received > 20 and driver.completed > 20)
        yield driver
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert driver.error == []


@pytest.fixture
def link() -> SocketLink:
    return SocketLink()


@pytest.fixture
def card(link: SocketLink) -> Iterator[NetworkCard]:
    card = NetworkCard(link)
    yield card
    card.close()


def test_under_traffic_and_plugged_in_again(
    card: NetworkCard, link: SocketLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the card goes, nothing that the guest sent is without its completion, and the link is
    up again for the next driver."""
    drivers: list[Driver] = []
    in_the_end: list[tuple[int, int]] = []

    def suspended(channel: object) -> None:
        in_the_end.append((drivers[-1].sent, drivers[-1].completed))

    monkeypatch.setattr(card, "suspended", suspended)
    with serving(card) as (_, path, _), SoftwareGuest.connect(path) as guest:
        for turn in range(1, 4):
            with busy(guest, link) as driver:
                drivers.append(driver)
                assert driver.netvsc.indications == []
                assert guest.unplug()
                assert driver.netvsc.indications == [DISCONNECTED]
            assert len(in_the_end) == turn
            guest.reconnect(path)
        assert [sent for sent, _ in in_the_end] == [completed for _, completed in in_the_end]
        with busy(guest, link) as driver:
            drivers.append(driver)


def test_no_frames_any_more(card: NetworkCard, link: SocketLink) -> None:
    """As soon as the guest knows that the link is down, and whatever the link does meanwhile."""
    with SoftwareGuest.for_device(card) as guest, busy(guest, link) as driver:
        guest.front_end.request(m.Unplug())
        eventually(lambda: DISCONNECTED in driver.netvsc.indications)
        turn = driver.turns
        eventually(lambda: driver.turns > turn + 1)  # what was in the ring before is counted
        before = driver.received
        link.changed()
        link.set_carrier(False)
        link.set_carrier(True)
        guest.wait_for_rescind(0)
        assert driver.received == before
        assert driver.netvsc.indications == [DISCONNECTED]


def test_a_driver_that_takes_no_hint(
    card: NetworkCard,
    link: SocketLink,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is waited for, but not for ever."""
    monkeypatch.setattr(leaving, "PATIENCE_SECONDS", 0.4)
    with SoftwareGuest.for_device(card) as guest, busy(guest, link, obeys=False):
        begin = time.monotonic()
        assert guest.unplug()
        assert time.monotonic() - begin >= 0.4
    assert "does not come to rest" in caplog.text


@pytest.mark.parametrize("knows", [False, True])
def test_a_guest_that_is_stopped_keeps_its_time(
    card: NetworkCard, link: SocketLink, monkeypatch: pytest.MonkeyPatch, knows: bool
) -> None:
    """A minute passes, before it knows that its link is down or before it has acted on that: it
    goes on where it was, and loses its card when it is done."""
    clock = StoppedClock()
    for module in (quiet, leaving):
        monkeypatch.setattr(module, "time", clock)
    with SoftwareGuest.for_device(card) as guest:
        netvsc = Netvsc(guest, guest.enable(0))
        netvsc.initialize()
        guest.front_end.request(m.Unplug())
        if knows:
            netvsc.pump()
            assert netvsc.indications == [DISCONNECTED]

        def sent() -> bool:
            clock.tick(0.02)
            return netvsc.channel.ring.state.rx_available > 0

        eventually(sent)  # something that shows whether it runs
        clock.pass_seconds(60)
        assert guest.channel_offers == []
        assert netvsc.send(ethernet(b"late")).wait() == 1
        assert link.get().frame == ethernet(b"late")

        def gone() -> bool:
            clock.tick(0.02)
            with contextlib.suppress(ReceiveTimeout, ChannelNotOpen):
                netvsc.pump(0.001)
            return guest.channel_offers == [m.RescindChannel(0)]

        eventually(gone)
        assert netvsc.indications == [DISCONNECTED]
        if knows:
            assert set(netvsc.send_table) == {0}, "what it was sent changes nothing"


def test_a_card_that_is_not_in_use(card: NetworkCard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not open, not negotiated, or without RNDIS: nobody to wait for."""
    monkeypatch.setattr(leaving, "LINK_CHANGE_SECONDS", 8.0)
    with serving(card) as (_, path, _), SoftwareGuest.connect(path) as guest:
        for step in range(4):
            if step:
                netvsc = Netvsc(guest, guest.enable(0))
            if step > 1:
                assert netvsc.negotiate(0x60001)
            if step > 2:
                netvsc.configure()
                netvsc.lend_receive_buffer()
            begin = time.monotonic()
            assert guest.unplug()
            assert time.monotonic() - begin < 7.0
            guest.reconnect(path)


def test_opened_anew_with_a_link_that_is_down(
    card: NetworkCard, link: SocketLink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The carrier counts that the link has then."""
    monkeypatch.setattr(leaving, "LINK_CHANGE_SECONDS", 0.0)  # this driver sends nothing
    with serving(card) as (_, path, _), SoftwareGuest.connect(path) as guest:
        for up in (False, True, True, False):
            link.set_carrier(up)
            netvsc = Netvsc(guest, guest.enable(0))
            netvsc.initialize()
            assert netvsc.query(CONNECT_STATUS)[0] == (not up)
            unplugging, outcome = in_thread(guest.unplug)
            if up:
                netvsc.pump()
                assert netvsc.indications == [DISCONNECTED]
            unplugging.join()
            assert outcome == [True]
            guest.reconnect(path)
