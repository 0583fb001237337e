# SPDX-License-Identifier: GPL-2.0-or-later
"""Several channels of one network card: subchannels, receive-side scaling, the send table."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

import pytest

from tests.support.net_card import MAC, SocketLink, ethernet, ip_frame
from tests.support.waiting import eventually
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.errors import GuestSideError, ReceiveTimeout
from vhostvmbus.guest.netvsc import HASH, Netvsc
from vhostvmbus.wire.errors import ChannelClosed

KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
SCALING = 0x00010204
FULL = (1 << 64) - 2
"""The most that an eventfd's counter can be."""


@contextlib.contextmanager
def several(queues: int = 4) -> Iterator[tuple[SocketLink, NetworkCard, Netvsc]]:
    """A card on a link with four queues, and a driver that is initialized."""
    link = SocketLink(queues)
    card = NetworkCard(link, queues=4)
    try:
        with SoftwareGuest.for_device(card) as guest:
            driver = Netvsc(guest, guest.enable(0))
            driver.initialize()
            yield link, card, driver
    finally:
        card.close()


def open_all(driver: Netvsc, count: int) -> int:
    """Asks for subchannels and opens them; how many there are."""
    granted = driver.subchannels(count)
    for index in range(1, granted + 1):
        driver.guest.wait_for_offer(index)
        driver.channels[index] = driver.guest.enable(index)
    return granted


def scaling(table: list[int], flags: int = 0) -> bytes:
    head = struct.pack(
        "<BBH HHI HxxI HxxI III", 0x89, 2, 40, flags, 0, 0x1701, 4 * len(table), 40, 40,
        40 + 4 * len(table), 0, 0, 0,
    )  # fmt: skip
    return head + struct.pack(f"<{len(table)}I", *table) + KEY


@pytest.mark.parametrize("queues", [4, 1])
def test_frames_go_where_the_table_says(queues: int) -> None:
    with several(queues) as (link, _card, driver):
        assert open_all(driver, 9) == 3
        driver.pump()
        assert driver.send_table == tuple(number % 4 for number in range(16))
        assert link.queues_used[-1] == queues
        frame = ip_frame(b"first", to=MAC)
        link.put(frame, queue=queues - 1)
        assert driver.receive().channel == 0  # nothing is scaled yet
        assert driver.set(SCALING, scaling([number % 4 for number in range(128)])) == 0
        found = {}
        for port in range(1000, 1040):
            frame = ip_frame(b"flow", to=MAC, ports=(port, 80))
            link.put(frame, queue=port % queues)
            got = driver.receive()
            assert got.data == frame
            assert got.channel == got.info[HASH] % 128 % 4
            found[got.channel] = found.get(got.channel, 0) + 1
        assert set(found) == {0, 1, 2, 3}
        assert driver.set(SCALING, scaling([2] * 128)) == 0
        for port in range(1000, 1010):
            link.put(ip_frame(b"flow", to=MAC, ports=(port, 80)))
            assert driver.receive().channel == 2
        link.put(ethernet(b"no IP", to=MAC))
        got = driver.receive()
        assert (got.channel, got.info) == (0, {})
        assert driver.set(SCALING, scaling([2], flags=0x10)) == 0
        link.put(ip_frame(b"off", to=MAC))
        got = driver.receive()
        assert (got.channel, got.info) == (0, {})


def test_every_channel_sends_and_returns() -> None:
    with several() as (link, card, driver):
        assert open_all(driver, 3) == 3
        for index in range(4):
            frame = ethernet(bytes([index]) * 60)
            assert driver.send(frame, channel=index).wait() == 1
            assert link.get(index).frame == frame
            assert driver.send(frame, channel=index, pages=True).wait() == 1
            assert link.get(index).frame == frame
        sent = card.stats()["sent"]
        assert sent["frames"] == 8
        assert card.stats()["channels"] == 4
        eventually(lambda: card.stats()["receive_sections_free"] == driver.receive_sections)


def test_a_channel_that_closes_gives_its_frames_to_the_first() -> None:
    with several() as (link, _card, driver):
        assert open_all(driver, 3) == 3
        assert driver.set(SCALING, scaling([3] * 128)) == 0
        link.put(ip_frame(b"three", to=MAC))
        assert driver.receive().channel == 3
        driver.channels.pop(3)
        driver.guest.disable(3)
        link.put(ip_frame(b"none", to=MAC))
        assert driver.receive().channel == 0


def test_the_driver_starts_anew_with_another_number() -> None:
    """As ``ethtool -L`` does: everything is closed, and asked for again."""
    with several() as (link, _card, driver):
        for count in (3, 1, 2):
            assert open_all(driver, count) == count
            assert link.queues_used[-1] == count + 1
            for index in range(count, 0, -1):
                driver.channels.pop(index)
                driver.guest.disable(index)
            guest = driver.guest
            guest.disable(0)
            driver = Netvsc(guest, guest.enable(0))
            driver.initialize()
            assert link.queues_used[-1] == 1
        link.put(ethernet(b"end", to=MAC))
        assert driver.receive().data == ethernet(b"end", to=MAC)


def test_a_subchannel_has_no_say() -> None:
    with several() as (link, card, driver):
        assert open_all(driver, 1) == 1
        for kind in (1, 100, 101, 103, 106, 125, 133):
            message = struct.pack("<III", kind, 2, 2).ljust(40, b"\0")
            driver.channels[1].send(message)
        control = driver._send(struct.pack("<III", 8, 12, 1), None, channel_type=1, channel=1)
        assert control.wait() == 5
        assert card.stats()["errors"] == {"NvspError": 8}
        assert card.stats()["version"] == "6.1"
        assert driver.send(ethernet(b"fine"), channel=1).wait() == 1
        assert link.get(1).frame == ethernet(b"fine")


def test_a_second_request_is_refused() -> None:
    with several() as (_, card, driver):
        assert open_all(driver, 1) == 1
        assert driver.subchannels(2) == 0
        assert card.stats()["errors"] == {"NvspError": 1}


def test_a_front_end_without_offers() -> None:
    """The guest goes on with one channel."""
    card = NetworkCard(SocketLink(4))
    with SoftwareGuest.for_device(card, takes_offers=False) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert driver.subchannels(3) == 0
        assert driver.send(ethernet(b"alone")).wait() == 1
    card.close()


def test_another_back_end_has_the_driver_start_anew() -> None:
    """What had been agreed died with the first one: the card goes, and is there again."""
    links = SocketLink(4), SocketLink(4)
    first, second = (NetworkCard(link) for link in links)
    with serving(second) as (_, path, _), SoftwareGuest.for_device(first) as guest:
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert open_all(driver, 2) == 2
        gpadls = set(guest.gpadls)
        guest.reconnect(path)

        def gone() -> bool:
            with contextlib.suppress(ReceiveTimeout, GuestSideError, ChannelClosed):
                driver.pump(0.01)
            return not gpadls & set(guest.gpadls)

        eventually(gone)
        assert guest.channels == {}
        guest.wait_for_offer(0)
        driver = Netvsc(guest, guest.enable(0))
        driver.initialize()
        assert driver.send(ethernet(b"again")).wait() == 1
        assert links[1].get().frame == ethernet(b"again")
        assert open_all(driver, 3) == 3
        guest.disconnect()
    first.close()
    second.close()


def test_a_table_with_a_channel_that_cannot_be() -> None:
    with several() as (_, card, driver):
        assert driver.set(SCALING, scaling([4] * 128)) == 0xC0010015
        assert card.stats()["errors"] == {"OidDataInvalid": 1}


def fill(eventfd: int) -> None:
    """Has whoever signals there block."""
    os.set_blocking(eventfd, False)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(eventfd, FULL)
    os.set_blocking(eventfd, True)


@pytest.mark.parametrize("how", ["close", "open", "teardown"])
def test_a_channel_whose_signal_blocks_holds_up_no_other(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The thread that receives blocks in it, with what all channels of the card have in common."""
    with several() as (link, _card, driver):
        guest = driver.guest
        assert open_all(driver, 3) == 3
        assert driver.set(SCALING, scaling([1] * 128)) == 0
        fill(driver.channels[1].call_fd)
        link.put(ip_frame(b"told of without end", to=MAC))
        eventually(lambda: driver.channels[1].ring.state.rx_available > 0)
        if how == "open":
            guest.disable(3)
            fill(driver.channels[1].call_fd)
            link.put(ip_frame(b"and again", to=MAC))
            guest.enable(3)
        elif how == "close":
            guest.disable(2)
        else:
            assert driver.receive_gpadl is not None
            guest.delete_gpadl(driver.receive_gpadl)
        guest.disable(1)
        guest.disconnect()
    assert "left behind" not in caplog.text


def test_a_signal_that_was_not_seen_yet_stays() -> None:
    """Only a counter at its limit is emptied while another channel ends."""
    with several() as (_, _, driver):
        assert open_all(driver, 1) == 1
        assert driver.guest.host is not None
        call = driver.channels[0].call_fd
        os.eventfd_write(call, 5)
        driver.guest.host.left.unblock()
        assert os.eventfd_read(call) >= 5
        fill(call)
        driver.guest.host.left.unblock()
        os.set_blocking(call, False)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(call)
