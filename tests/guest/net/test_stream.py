# SPDX-License-Identifier: GPL-2.0-or-later
"""A card on a stream, as with passt: frames behind their lengths, whole or in parts, and a peer
that does not read, lies about a length, or dies in the middle of a frame."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.net_card import MAC, HastyCard, Rig, StreamLink, ethernet, ip_frame, rig
from tests.support.waiting import eventually
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.link.pcap import Recorded
from vhostvmbus.guest.netvsc import CHECKSUM, LARGE_SEND, VLAN, VLAN_CAPABLE, element


@pytest.fixture
def link() -> StreamLink:
    return StreamLink(mtu=65000)


@pytest.fixture
def r(link: StreamLink) -> Iterator[Rig]:
    with rig(link=link, ring_pages=(17, 65)) as found:
        found.driver.initialize(mtu=65000, capabilities=VLAN_CAPABLE, receive_bytes=8 << 20)
        yield found


def numbered(count: int) -> list[bytes]:
    return [ethernet(struct.pack(">I", number) + bytes(50), to=MAC) for number in range(count)]


def test_frames_of_every_size(r: Rig) -> None:
    chance = random.Random(6)
    for size in (14, 15, 60, 1514, 4096, 9014, 40000, 65014):
        data = chance.randbytes(size - 14)
        for pages in (False, True)[size > 6000 :]:
            assert r.driver.send(ethernet(data), pages=pages).wait() == 1
            assert r.link.get().frame == ethernet(data)
        r.link.put(ethernet(data, to=MAC))
        got = r.driver.receive()
        assert (got.data, got.info, got.parts) == (ethernet(data, to=MAC), {}, 1)


def test_a_tag_goes_into_the_frame_and_out_of_it(r: Rig) -> None:
    plain, tagged = ip_frame(b"x" * 60, to=MAC), ip_frame(b"x" * 60, to=MAC, tag=0xA123)
    r.link.put(tagged)
    got = r.driver.receive()
    assert (got.data, got.info) == (plain, {VLAN: 5 | 0x123 << 4})
    assert r.driver.send(plain, element(VLAN, 5 | 0x123 << 4)).wait() == 1
    assert r.link.get().frame == tagged


def test_many_at_once_come_together_and_in_order(r: Rig, link: StreamLink) -> None:
    frames = numbered(300)
    link.world[0].sendall(b"".join(struct.pack(">I", len(frame)) + frame for frame in frames))
    assert [r.driver.receive().data for _ in frames] == frames
    assert r.driver.transfer_packets < 100


@pytest.mark.parametrize("size", [1, 3, 7, 61, 4096])
def test_however_the_stream_is_cut(r: Rig, link: StreamLink, size: int) -> None:
    frames = numbered(3) + [ethernet(bytes(range(256)) * 30, to=MAC)] * (size > 7)
    data = b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)
    for start in range(0, len(data), size):
        link.world[0].sendall(data[start : start + size])
        if start % 5 == 0:
            time.sleep(0.0005)  # the card is to see it in parts
    assert [r.driver.receive().data for _ in frames] == frames


def test_nothing_is_offered_and_what_is_wanted_is_refused(r: Rig) -> None:
    assert r.link.wanted[-1] == Capabilities()
    assert not any(r.driver.query(0xFC01020D)[4:])
    frame = ip_frame(b"x" * 3000, seed="pseudo")
    for info in (element(CHECKSUM, 34 << 16 | 5), element(LARGE_SEND, 1400 | 34 << 20 | 1 << 30)):
        assert r.driver.send(frame, info).wait() == 5
    assert r.card.stats()["errors"] == {"FrameError": 2}
    assert r.driver.send(ethernet(b"well")).wait() == 1
    assert r.link.get().frame == ethernet(b"well")


def test_a_peer_that_does_not_read(r: Rig, link: StreamLink) -> None:
    """Frames are refused, never cut short; the rest of the last one goes when there is room."""
    chance, sent = random.Random(7), []
    while not r.card.stats()["send_refused"]:
        frame = ethernet(chance.randbytes(30000))
        before = r.card.stats()["sent"]["frames"]
        assert r.driver.send(frame, pages=True).wait() == 1
        if r.card.stats()["sent"]["frames"] > before:
            sent.append(frame)
    link.world[0].setblocking(False)
    got = []
    while len(got) < len(sent):
        try:
            got.append(link.get(timeout=0.01).frame)
        except TimeoutError:
            link.ports[0].flush()  # as the link to passt does when it is woken
    assert got == sent
    assert link.ports[0].refused == r.card.stats()["send_refused"]
    assert r.driver.send(ethernet(b"again")).wait() == 1
    assert link.get().frame == ethernet(b"again")


def test_a_peer_that_dies_amid_a_frame(r: Rig, link: StreamLink) -> None:
    """Its frame is lost, in both directions; the next one's are not mixed with it."""
    first, second = ethernet(b"first" * 20, to=MAC), ethernet(b"second" * 20, to=MAC)
    link.put(first)
    assert r.driver.receive().data == first
    for cut in (2, 4, 50):
        link.world[0].sendall((struct.pack(">I", len(first)) + first)[:cut])
        link.reconnect()
        link.put(second)
        assert r.driver.receive().data == second
    while not r.card.stats()["send_refused"]:
        assert r.driver.send(ethernet(bytes(30000)), pages=True).wait() == 1
    link.reconnect()
    assert r.driver.send(ethernet(b"again")).wait() == 1
    assert link.get().frame == ethernet(b"again")


def test_a_peer_that_lies_about_a_length(r: Rig, link: StreamLink) -> None:
    link.world[0].sendall(struct.pack(">I", 5) + bytes(100))
    eventually(lambda: link.ports[0].broken == "a frame of 5 bytes")
    assert r.driver.send(ethernet(b"lost")).wait() == 1
    assert r.card.stats()["send_refused"] == 1
    link.reconnect()
    link.put(ethernet(b"well", to=MAC))
    assert r.driver.receive().data == ethernet(b"well", to=MAC)


def test_frames_wait_for_a_guest_that_returns_nothing() -> None:
    with rig(link=StreamLink(), kind=HastyCard, ring_pages=(17, 65)) as r:
        r.driver.initialize(receive_bytes=64 * 1728)
        r.driver.keep = True
        count = r.driver.receive_sections
        frames = numbered(count + 40)
        for frame in frames:
            r.link.put(frame)
        assert [r.driver.receive().data for _ in range(count - 8)] == frames[: count - 8]
        eventually(lambda: r.card.stats()["receive_no_buffer"] == 48)
        kept, r.driver.kept, r.driver.keep = r.driver.kept, [], False
        for packet in kept:
            r.driver.give_back(packet)
        eventually(lambda: r.card.stats()["receive_sections_free"] == count)
        r.link.put(ethernet(b"again", to=MAC))
        assert r.driver.receive().data == ethernet(b"again", to=MAC)


def test_a_frame_longer_than_a_section_is_dropped() -> None:
    with rig(link=StreamLink()) as r:
        r.driver.initialize()
        r.link.put(ethernet(bytes(5000), to=MAC))
        r.link.put(ethernet(b"fits", to=MAC))
        assert r.driver.receive().data == ethernet(b"fits", to=MAC)
        assert r.card.stats()["receive_errors"] == 1
        assert r.link.ports[0].too_long == 1


def test_all_of_it_is_recorded(tmp_path: Path) -> None:
    """In the order in which it crossed, also what nobody took."""
    path, link = tmp_path / "card.pcapng", StreamLink()

    class RecordedCard(NetworkCard):
        def __init__(self, link: StreamLink) -> None:
            super().__init__(Recorded(link, str(path)))

    with rig(link=link, kind=RecordedCard) as r:
        r.driver.initialize()
        assert r.driver.send(ethernet(b"question")).wait() == 1
        link.get()
        link.put(ethernet(b"not for us"))
        link.put(ethernet(b"answer", to=MAC))
        assert r.driver.receive().data == ethernet(b"answer", to=MAC)
        data = path.read_bytes()
        places = [data.index(word) for word in (b"question", b"not for us", b"answer")]
        assert places == sorted(places)
        assert r.card.stats()["link"] == {"name": "test", "lost": 7, "not_recorded": 0}
