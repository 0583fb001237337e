# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest with few receive sections: frames wait in the link as long as it gives some back."""

from __future__ import annotations

import struct
import threading
import time

import pytest

from tests.support.net_card import MAC, HastyCard, Rig, SocketLink, StreamLink, ethernet, rig
from tests.support.waiting import eventually
from vhostvmbus.devices.net import NetworkCard

FEW = 37
"""The sections that iPXE lends."""


class Patient(NetworkCard):
    """Never drops a frame for want of a section, however busy this machine is."""

    patience = 600.0


def numbered(number: int) -> bytes:
    return ethernet(struct.pack(">I", number) + bytes(50), to=MAC)


@pytest.mark.parametrize("link", [SocketLink, StreamLink])
def test_nothing_is_dropped_that_the_guest_takes_in_time(link: type[SocketLink]) -> None:
    """The world sends faster than the guest takes, and is held up."""
    count = 2000
    with rig(kind=Patient, link=link(), ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=FEW * 1728)

        def send() -> None:
            for number in range(count):
                r.link.put(numbered(number))

        world = threading.Thread(target=send)
        world.start()
        assert [r.driver.receive().data for _ in range(count)] == [
            numbered(number) for number in range(count)
        ]
        world.join()
        assert r.card.stats()["receive_no_buffer"] == 0


def all_are_back(r: Rig) -> None:
    eventually(lambda: r.card.stats()["receive_sections_free"] == r.driver.receive_sections)


def take_what_waits(r: Rig) -> None:
    """Has the guest read its ring until every frame has come and gone: answers overtake them."""

    def taken() -> bool:
        assert r.driver.query(0x01010101) == MAC
        return bool(r.card.stats()["receive_sections_free"] == r.driver.receive_sections)

    eventually(taken)


def starve(r: Rig) -> None:
    """Has the guest keep all sections for frames, and lets twenty frames wait."""
    all_are_back(r)
    r.driver.keep = True
    frames = r.driver.receive_sections - 8
    for number in range(frames):
        r.link.put(numbered(number))
        r.driver.receive()
    for number in range(20):
        r.link.put(numbered(number))


class Brisk(NetworkCard):
    """Drops frames if the guest gives no section back for longer than a busy machine takes."""

    patience = 0.4


def returned_in_time(r: Rig) -> bool:
    """Has the guest return one section for each that it takes, for longer than the patience.

    Returns false if this machine was too busy to do so without a pause.
    """
    last = time.monotonic()
    starve(r)
    end, longest = time.monotonic() + 2 * Brisk.patience, 0.0
    while (now := time.monotonic()) < end:
        longest, last = max(longest, now - last), now
        r.driver.give_back(r.driver.kept.pop(0))
        r.driver.receive()
        r.link.put(numbered(0))
    return max(longest, time.monotonic() - last) < Brisk.patience / 2


def test_whoever_returns_something_loses_nothing() -> None:
    """It is never without progress, though never with a section to spare."""
    with rig(kind=Brisk, ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=FEW * 1728)
        for _ in range(100):
            before = r.card.stats()["receive_no_buffer"]
            if returned_in_time(r):
                assert r.card.stats()["receive_no_buffer"] == before
                return
            for packet in r.driver.kept:
                r.driver.give_back(packet)
            r.driver.kept, r.driver.keep = [], False
            take_what_waits(r)
            r.driver.frames.clear()
        pytest.fail("this machine was too busy a hundred times")


def test_whoever_returns_nothing_is_not_waited_for() -> None:
    with rig(kind=HastyCard, ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=FEW * 1728)
        starve(r)
        eventually(lambda: r.card.stats()["receive_no_buffer"] == 20)
        free = r.card.stats()["receive_sections_free"]
        r.driver.give_back(r.driver.kept.pop(0))
        eventually(lambda: r.card.stats()["receive_sections_free"] > free)
        r.link.put(numbered(7))
        assert r.driver.receive().data == numbered(7)


BOOT_PROGRAM = (2,)
"""The protocol versions that iPXE tries: 1, as it is on the wire."""


@pytest.mark.parametrize("translated", [False, True], ids=["in C", "by hand"])
def test_a_boot_program_gets_each_frame_in_a_packet_of_its_own(translated: bool) -> None:
    """They are in order then, whatever it does with the parts of a packet."""
    with rig(kind=Patient, ring_pages=(17, 65), code_map=translated) as r:
        r.driver.initialize(versions=BOOT_PROGRAM, receive_bytes=FEW * 1728)
        starve(r)
        if translated:
            assert r.guest.code_map is not None
            assert r.driver.receive_gpadl is not None
            for pfn in r.driver.receive_gpadl.owned_pfns:
                r.guest.code_map.mark(pfn)
        before = r.driver.transfer_packets
        for packet in r.driver.kept:
            r.driver.give_back(packet)
        assert [r.driver.receive().data for _ in range(20)] == [numbered(n) for n in range(20)]
        assert r.driver.transfer_packets == before + 20


def test_a_boot_program_gets_nothing_new_before_it_has_given_all_back() -> None:
    """It would go on reading its ring, and not come to what it has read."""
    with rig(kind=Patient, ring_pages=(17, 65)) as r:
        r.driver.initialize(versions=BOOT_PROGRAM, receive_bytes=FEW * 1728)
        starve(r)
        r.driver.keep = False
        *kept, last = r.driver.kept
        for packet in kept:
            r.driver.give_back(packet)
            assert r.driver.query(0x01010101) == MAC
        assert not r.driver.frames
        r.driver.give_back(last)
        assert r.driver.receive().data == numbered(0)


def test_a_section_that_a_boot_program_loses_does_not_end_the_traffic() -> None:
    with rig(kind=HastyCard, ring_pages=(17, 65)) as r:
        r.driver.initialize(versions=BOOT_PROGRAM, receive_bytes=FEW * 1728)
        starve(r)
        r.driver.keep = False
        for packet in r.driver.kept[1:]:
            r.driver.give_back(packet)
        r.link.put(numbered(7))
        while r.driver.receive().data != numbered(7):
            pass
