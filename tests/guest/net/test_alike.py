# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card does the same whichever way a frame goes, whatever the guest sends and the link
has.

Two cards get the same steps. One does whatever can be done there on the channel's worker and the
queue's thread, in C; with the other every packet goes up, and so does every frame, since code may
be where it was written. Frames on either side, completions, counters and errors have to be equal.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.net_card import (
    MAC,
    OFFLOAD_PARAMETERS,
    PEER,
    Rig,
    SocketLink,
    ethernet,
    ip_frame,
    rig,
)
from tests.support.vnet import HEADER
from tests.support.waiting import eventually
from vhostvmbus.devices.net import NetworkCard
from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.guest import ReceiveTimeout
from vhostvmbus.guest.netvsc import (
    CHECKSUM,
    LARGE_SEND,
    NO_SECTION,
    RSC_CAPABLE,
    VLAN,
    VLAN_CAPABLE,
    Frame,
    element,
    packet_message,
)
from vhostvmbus.wire.gpa import GpaRange

HASH, OTHER = 8, 3
"""Kinds of per-packet information: one that is read and not used, one that is passed over."""
BROADCAST = b"\xff" * 6
SENTINEL = ethernet(b"the last one", to=BROADCAST)
EVERYTHING_ON = bytes([1, 4, 4, 4, 4, 0, 0, 2, 2, 0, 0])

# -- what the guest sends --------------------------------------------------------------------------

u32 = st.one_of(
    st.sampled_from([0, 1, 12, 16, 36, 44, 0xFFFFFFFF, 0x80000000, 1 << 16]),
    st.integers(0, 0xFFFFFFFF),
)
ip_frames = st.builds(
    ip_frame,
    st.integers(0, 4000).map(lambda size: bytes(i * 7 & 0xFF for i in range(size))),
    ip6=st.booleans(),
    udp=st.booleans(),
    to=st.sampled_from([PEER, BROADCAST, b"\x01\0\x5e\0\0\x01"]),
    seed=st.sampled_from(["full", "pseudo", "large"]),
    options=st.sampled_from([0, 12, 40]),
    tag=st.sampled_from([None, None, 7, 0xFFFF]),
)
sent_frames = st.one_of(ip_frames, ip_frames, st.binary(max_size=100), st.binary(min_size=1500))


@st.composite
def checksums(draw: st.DrawFn) -> bytes:
    """What is left to be computed: sensible, or any bits."""
    flags = draw(st.sampled_from([5, 6, 9, 10, 0x11, 0x15, 0x1F, 0, 0x0D]))
    start = draw(st.sampled_from([0, 34, 38, 54, 58, 33, 1023]))
    return element(CHECKSUM, draw(st.one_of(st.just(flags | start << 16), u32)))


@st.composite
def large_sends(draw: st.DrawFn) -> bytes:
    segment = draw(st.sampled_from([1400, 48, 47, 0xFFFF, 0x10000, 0]))
    start = draw(st.sampled_from([34, 54, 38, 58, 35, 1023]))
    top = draw(st.sampled_from([1, 3, 3, 1, 0, 2]))
    return element(LARGE_SEND, draw(st.one_of(st.just(segment | start << 20 | top << 30), u32)))


infos = st.lists(
    st.one_of(
        checksums(),
        large_sends(),
        st.builds(element, st.sampled_from([VLAN, HASH, OTHER, OTHER | 1 << 31]), u32),
        st.sampled_from([element(OTHER, 1)[:12], bytes(16), element(VLAN, 5) + bytes(4)]),
    ),
    max_size=3,
).map(b"".join)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """An RNDIS message, with numbers in its header or its information changed, or not."""
    info = draw(infos)
    data = bytearray(packet_message(draw(sent_frames), info, draw(st.sampled_from([0, 0, 4, 7]))))
    for place, value in draw(
        st.lists(st.tuples(st.integers(0, 10 + len(info) // 4), u32), max_size=draw(st.just(1)))
        if draw(st.integers(0, 3)) == 0
        else st.just([])
    ):
        struct.pack_into("<I", data, 4 * place, value)
    return bytes(data)


@dataclass(frozen=True)
class Packet:
    """Bytes of the guest's, the first ones in a section."""

    data: bytes
    section: int
    number: int = 0
    size: int | None = None

    def on(self, side: Side) -> object:
        driver = side.rig.driver
        assert driver.send_gpadl is not None
        section = self.data[: min(self.section, driver.send_section)]
        rest = self.data[len(section) :]
        driver.guest.ram.write(driver.send_gpadl.owned_pfns, section)
        number = self.number if section or self.size is not None else NO_SECTION
        size = len(section) if self.size is None else self.size
        payload = struct.pack("<IIII", 107, 0, number, size).ljust(40, b"\0")
        if rest:
            ranges: list[GpaRange] = driver._scatter(rest)
            answer = side.rig.channel.submit_with_external_ranges(payload, ranges).wait()
            for item in ranges:
                driver.guest.ram.free_pages(item.pfns)
        else:
            answer = side.rig.channel.send(payload)
        return answer, side.world()


packets = st.builds(
    Packet,
    st.one_of(
        messages(),
        messages(),
        st.lists(messages(), min_size=2, max_size=3).map(b"".join),
        st.binary(max_size=200),
    ),
    st.sampled_from([0, 6144, 1, 44, 60, 76, 300]),
    st.sampled_from([0, 0, 0, 0, 0, 1 << 20, 41, 42]),
    st.sampled_from([None, None, None, None, 0, 44, 6144, 6145, 0xFFFFFFFF]),
)

# -- what the link has -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Received:
    """A frame for the guest, with its virtio-net header."""

    header: bytes
    frame: bytes

    def on(self, side: Side) -> object:
        side.mark()
        side.rig.link.world[0].sendall(self.header + self.frame)
        return side.received()


headers = st.builds(
    HEADER.pack,
    st.sampled_from([0, 0, 1, 1, 2, 3]),
    st.sampled_from([0, 0, 0, 1, 4, 3]),
    st.just(0),
    st.sampled_from([0, 1400]),
    st.sampled_from([0, 14, 34, 38, 54, 58, 95, 96, 97, 1616, 1617, 5000]),
    st.sampled_from([6, 16, 0, 1, 61, 62, 1600, 60000]),
)
addresses = st.sampled_from([MAC, MAC, BROADCAST, b"\x01\0\x5e\0\0\x01", PEER])


@st.composite
def link_frames(draw: st.DrawFn) -> bytes:
    frame = draw(st.one_of(ip_frames, ip_frames, st.binary(min_size=12, max_size=100)))
    frame = draw(addresses) + frame[6:]
    frame += bytes(draw(st.sampled_from([0, 0, 0, 1, 1600, 16272, 30000])))
    return frame[: draw(st.sampled_from([len(frame), len(frame), 1616, 13, 14, 17, 18, 34, 97]))]


arrivals = st.builds(Received, headers, link_frames())

# -- what is set, and given back -------------------------------------------------------------------


@dataclass(frozen=True)
class Filter:
    """The kinds of frames that are wanted; broadcasts always."""

    value: int

    def on(self, side: Side) -> object:
        return side.rig.driver.set(0x0001010E, struct.pack("<I", self.value | 8))


@dataclass(frozen=True)
class Offloads:
    """``NDIS_OFFLOAD_PARAMETERS``."""

    values: bytes
    coalescing: int

    def on(self, side: Side) -> object:
        data = (struct.pack("<BBH", 0x80, 3, 28) + self.values).ljust(22, b"\0")
        data += bytes([self.coalescing] * 2) + bytes(4)
        return side.rig.driver.set(OFFLOAD_PARAMETERS, data)


@dataclass(frozen=True)
class GiveBack:
    """All that the guest has, with that payload."""

    payload: bytes

    def on(self, side: Side) -> object:
        kept, side.rig.driver.kept = side.rig.driver.kept, []
        for packet in kept:
            packet.complete(self.payload)
        return None


steps = st.one_of(
    packets,
    packets,
    packets,
    arrivals,
    arrivals,
    arrivals,
    st.builds(Filter, st.sampled_from([1, 5, 0x20, 2, 0])),
    st.builds(
        Offloads,
        st.one_of(
            st.just(EVERYTHING_ON),
            st.lists(st.integers(0, 4), min_size=11, max_size=11).map(bytes),
        ),
        st.integers(0, 2),
    ),
    st.builds(GiveBack, st.sampled_from([struct.pack("<II", 108, 1), b"", b"\x6b\0\0\0\1\0\0\0"])),
)

# -- both ------------------------------------------------------------------------------------------


@dataclass
class Side:
    """One of the cards."""

    rig: Rig

    def mark(self) -> None:
        """Lets code be in every page that the card may write to, if there is a map of it."""
        code_map, gpadl = self.rig.guest.code_map, self.rig.driver.receive_gpadl
        if code_map is not None and gpadl is not None:
            for pfn in gpadl.owned_pfns:
                code_map.mark(pfn)

    def world(self) -> list[bytes]:
        """The frames that the world has got, headers and all."""
        frames = []
        self.rig.link.world[0].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(self.rig.link.world[0].recv(1 << 17))
        self.rig.link.world[0].setblocking(True)
        return frames

    def received(self) -> list[Frame]:
        """The frames that the guest has got."""
        self.rig.link.put(SENTINEL)
        frames: list[Frame] = []
        while not frames or frames[-1].data != SENTINEL:
            frames.append(self.rig.driver.receive())
        return frames[:-1]

    def state(self) -> dict[str, object]:
        """What the card counted since it was made."""
        stats = self.rig.card.stats()
        if "ReturnError" in stats["errors"]:
            stats["errors"]["ReturnError"] = (
                1  # how many frames are in a packet is a matter of time
            )
        return {name: stats[name] for name in sorted(stats)}


class CountingPath(DataPath):
    """Does nothing by itself for the guest, and counts what is done by hand."""

    by_hand = 0

    def configure(self, adapter: Adapter, **settings: bool) -> None:
        super().configure(adapter, **settings | {"active": False})

    def send(self, channel: int, data: bytes) -> None:
        self.by_hand += 1
        super().send(channel, data)


class ByHand(NetworkCard):
    """A card with that path."""

    def __init__(self, link: SocketLink) -> None:
        super().__init__(link)
        self._path = CountingPath()


@contextlib.contextmanager
def both(coalescing: bool) -> Iterator[tuple[Side, Side]]:
    """The card that does everything by hand, and the one that does not."""
    with contextlib.ExitStack() as stack:
        sides = []
        for kind in (ByHand, NetworkCard):
            made = stack.enter_context(rig(ring_pages=(17, 65), kind=kind, code_map=kind is ByHand))
            made.driver.initialize(
                capabilities=VLAN_CAPABLE | (RSC_CAPABLE if coalescing else 0),
                receive_bytes=4 << 20,
            )
            made.driver.keep = True
            sides.append(Side(made))
        yield sides[0], sides[1]


@pytest.mark.parametrize("coalescing", [False, True])
def test_both_do_the_same(coalescing: bool) -> None:
    with both(coalescing) as (by_hand, planned):
        Offloads(EVERYTHING_ON, 2).on(by_hand)
        Offloads(EVERYTHING_ON, 2).on(planned)

        @settings(deadline=None)
        @given(script=st.lists(steps, min_size=1, max_size=8))
        def run(script: list[Packet | Received | Filter | Offloads | GiveBack]) -> None:
            for step in [*script, GiveBack(struct.pack("<II", 108, 1))]:
                assert step.on(planned) == step.on(by_hand)
                eventually(lambda: planned.state() == by_hand.state(), 5)

        run()
        host = planned.rig.guest.host
        assert host is not None
        assert host.channels[0].stats.packets_planned > 50
        path = by_hand.rig.card._path
        assert isinstance(path, CountingPath)
        assert path.by_hand > 50
        assert len(by_hand.rig.guest.invalidations) > 50


def test_the_comparison_notices() -> None:
    """Another frame is another outcome, and another state."""
    with both(False) as (by_hand, planned):
        frame = ethernet(to=MAC)
        one = Received(bytes(10), frame).on(planned)
        assert one == Received(bytes(10), frame).on(by_hand)
        assert one != Received(bytes(10), ethernet(b"another", to=MAC)).on(by_hand)
        assert planned.state() != by_hand.state()
        with pytest.raises(ReceiveTimeout):
            planned.rig.driver.pump(0.01)
