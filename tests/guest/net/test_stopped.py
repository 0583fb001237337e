# SPDX-License-Identifier: GPL-2.0-or-later
"""The machine of a card is stopped: the guest's buffer stays as it is, and no frame is lost."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from tests.support.net_card import MAC, HastyCard, SocketLink, StreamLink, ethernet, rig
from tests.support.soak import times
from tests.support.stillness import cont, memory_of, stop
from tests.support.waiting import eventually
from vhostvmbus.guest.errors import ReceiveTimeout

TURNS = times(6, 200)
A_MOMENT = 0.1
"""Seconds in which a card that does not stand still would have done something."""


def numbered(number: int) -> bytes:
    return ethernet(struct.pack(">I", number) + bytes(50), to=MAC)


@pytest.mark.parametrize("link", [SocketLink, StreamLink])
def test_a_flood_of_frames(link: type[SocketLink]) -> None:
    """Stopped at any moment; frames wait in the link, and come in their order, each once."""
    with rig(link=link(), ring_pages=(17, 65)) as r:
        r.driver.initialize()
        ended = threading.Event()
        sent = 0

        def flood() -> None:
            nonlocal sent
            while not ended.is_set():
                r.link.put(numbered(sent))
                sent += 1

        world = threading.Thread(target=flood)
        world.start()
        try:
            expected = 0
            for turn in range(TURNS):
                stop(r.guest)
                memory = memory_of(r.guest)
                time.sleep(0.002)
                assert memory_of(r.guest) == memory, turn
                cont(r.guest)
                for _ in range(100):
                    assert r.driver.receive().data == numbered(expected)
                    expected += 1
        finally:
            ended.set()
            # It may be held up by a link that is full.
            while world.is_alive():
                try:
                    assert r.driver.receive(A_MOMENT).data == numbered(expected)
                    expected += 1
                except ReceiveTimeout:
                    continue
            world.join()
        while expected < sent:
            assert r.driver.receive().data == numbered(expected)
            expected += 1
        assert r.card.stats()["receive_no_buffer"] == 0


def test_a_guest_that_cannot_give_anything_back_does_not_starve() -> None:
    """A stop is longer than a card waits for a guest that keeps all its sections."""
    with rig(kind=HastyCard, ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=37 * 1728)
        frames = r.driver.receive_sections - 8  # the last ones are not taken: a frame may be longer
        for number in range(frames):
            r.link.put(numbered(number))
        eventually(lambda: r.card.stats()["receive_sections_free"] <= 8)
        stop(r.guest)
        for number in range(frames, frames + 20):
            r.link.put(numbered(number))
        time.sleep(3 * HastyCard.patience)
        assert r.card.stats()["receive_no_buffer"] == 0
        cont(r.guest)
        assert [r.driver.receive().data for _ in range(frames)] == [
            numbered(number) for number in range(frames)
        ]


def test_the_news_of_the_link_waits() -> None:
    """A cable that is pulled meanwhile is told of when the machine goes on."""
    with rig() as r:
        r.driver.initialize()
        stop(r.guest)
        memory = memory_of(r.guest)
        r.link.set_carrier(False)
        r.link.put(numbered(0))
        time.sleep(A_MOMENT)
        assert memory_of(r.guest) == memory
        cont(r.guest)
        while not r.driver.indications:
            r.driver.pump()
        assert r.driver.receive().data == numbered(0)
