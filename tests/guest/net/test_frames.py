# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames through the network card, to the world and from it, with every offload."""

from __future__ import annotations

import random
import struct
import time

import pytest

from tests.support.net_card import (
    EVERYTHING,
    MAC,
    OFFLOAD_PARAMETERS,
    SOURCE4,
    SOURCE6,
    TARGET4,
    TARGET6,
    Rig,
    ethernet,
    internet_checksum,
    ip_frame,
    pseudo_header,
    rig,
    switch_on,
)
from tests.support.vnet import Gso, Offload
from tests.support.waiting import eventually
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.guest.netvsc import (
    CHECKSUM,
    LARGE_SEND,
    RSC_CAPABLE,
    VLAN,
    VLAN_CAPABLE,
    BadNetPacket,
    element,
    packet_message,
)

# -- frames to the world ---------------------------------------------------------------------------


def test_frames_of_every_size_in_sections_and_pages() -> None:
    chance = random.Random(4)
    with rig(mtu=9000) as r:
        r.driver.initialize(mtu=9000)
        for size in (14, 15, 60, 61, 257, 1514, 4095, 4096, 4097, 6000, 9014, 9018):
            frame = ethernet(chance.randbytes(size - 14))
            for pages in (False, True):
                assert r.driver.send(frame, pages=pages).wait() == 1
                seen = r.link.get()
                assert (seen.frame, seen.offload) == (frame, Offload())
        sent = r.card.stats()["sent"]
        assert (sent["frames"], sent["directed_frames"]) == (24, 24)


def test_more_frames_under_way_than_send_sections() -> None:
    """The driver sends the others in pages, as Linux does."""
    with rig() as r:
        r.driver.initialize()
        sections = len(r.driver.free_sections)
        frames = [ethernet(bytes([n]) * 50) for n in range(sections + 5)]
        under_way = [r.driver.send(frame) for frame in frames]
        assert [r.link.get().frame for _ in frames] == frames
        assert {sending.wait() for sending in under_way} == {1}
        assert len(r.driver.free_sections) == sections
        for frame in frames[:sections]:
            r.driver.send_many([packet_message(frame)])
        with pytest.raises(BadNetPacket, match="no send section is free"):
            r.driver.send_many([packet_message(frames[-1])])


def test_many_messages_in_one_packet() -> None:
    frames = [ethernet(bytes([n]) * (20 + 7 * n)) for n in range(30)]
    messages = [packet_message(frame, padding=-(44 + len(frame)) % 8) for frame in frames]
    with rig() as r:
        r.driver.initialize()
        assert r.driver.send_many(messages).wait() == 1
        assert [r.link.get().frame for _ in frames] == frames
        # The last one's header is in the section, its frame in pages: Linux' partial copy.
        last = packet_message(frames[-1])
        assert r.driver.send_many([*messages[:3], last[:44]], last[44:]).wait() == 1
        assert [r.link.get().frame for _ in range(4)] == [*frames[:3], frames[-1]]
        middle = packet_message(frames[20])
        assert r.driver.send_many([messages[1], middle[:90]], middle[90:]).wait() == 1
        assert [r.link.get().frame for _ in range(2)] == [frames[1], frames[20]]


def test_what_the_host_side_does_not_take_is_counted() -> None:
    with rig() as r:
        r.driver.initialize()
        frame = ethernet(b"x" * 1400)
        for _ in range(2000):
            assert r.driver.send(frame).wait() == 1
            if r.card.stats()["send_refused"]:
                break
        stats = r.card.stats()
        assert stats["send_refused"] >= 1
        assert stats["errors"] == {}


@pytest.mark.parametrize("tag", [None, 0x2005])
@pytest.mark.parametrize("ip6", [False, True])
@pytest.mark.parametrize("udp", [False, True])
def test_a_checksum_is_left_to_the_link(udp: bool, ip6: bool, tag: int | None) -> None:
    with rig() as r:
        r.driver.initialize()
        switch_on(r.driver)
        start = 54 if ip6 else 34
        value = (2 if ip6 else 1) | (8 if udp else 4) | start << 16
        info = element(CHECKSUM, value)
        if tag is not None:
            info += element(VLAN, tag >> 13 | (tag & 0xFFF) << 4)
        frame = ip_frame(b"payload" * 9, ip6=ip6, udp=udp, seed="pseudo")
        for pages in (False, True):
            assert r.driver.send(frame, info, pages=pages).wait() == 1
            seen = r.link.get()
            shift = 0
            if tag is not None:
                assert seen.frame[12:16] == b"\x81\0" + tag.to_bytes(2, "big")
                assert seen.frame[:12] + seen.frame[16:] == frame
                shift = 4
            else:
                assert seen.frame == frame
            assert seen.offload == Offload(True, False, start + shift, 6 if udp else 16)
            check_transport(finish(seen.frame, seen.offload), ip6, 17 if udp else 6, shift)


def finish(frame: bytes, offload: Offload) -> bytes:
    """What a card that can do it does: stores the checksum."""
    at = offload.start + offload.offset
    value = internet_checksum(frame[offload.start :])
    return frame[:at] + value.to_bytes(2, "big") + frame[at + 2 :]


def check_transport(frame: bytes, ip6: bool, protocol: int, shift: int = 0) -> None:
    """The transport checksum of a whole frame is right."""
    start = (54 if ip6 else 34) + shift
    addresses = (SOURCE6, TARGET6) if ip6 else (SOURCE4, TARGET4)
    pseudo = pseudo_header(ip6, *addresses, protocol, len(frame) - start)
    assert internet_checksum(pseudo + frame[start:]) == 0


@pytest.mark.parametrize("tag", [None, 7])
@pytest.mark.parametrize("ip6", [False, True])
@pytest.mark.parametrize("size", [1000, 20000, 65000])
def test_a_large_send_crosses_in_one_piece(size: int, ip6: bool, tag: int | None) -> None:
    data = random.Random(size).randbytes(size)
    with rig() as r:
        r.driver.initialize()
        switch_on(r.driver)
        start = 54 if ip6 else 34
        info = element(LARGE_SEND, 1400 | start << 20 | 1 << 30 | ip6 << 31)
        if tag is not None:
            info += element(VLAN, tag << 4)
        frame = ip_frame(data, ip6=ip6, seed="large")
        assert r.driver.send(frame, info, pages=True).wait() == 1
        seen = r.link.get()
        shift = 0 if tag is None else 4
        gso = Gso.NONE if size < 1400 else Gso.TCPV6 if ip6 else Gso.TCPV4
        segment, headers = (1400, start + 32 + shift) if gso else (0, 0)
        assert seen.offload == Offload(True, False, start + shift, 16, gso, segment, headers)
        assert seen.frame[start + 32 + shift :] == data
        whole = finish(seen.frame, seen.offload)
        check_transport(whole, ip6, 6, shift)
        ip = whole[14 + shift :]
        if ip6:
            assert int.from_bytes(ip[4:6], "big") == len(ip) - 40
        else:
            assert int.from_bytes(ip[2:4], "big") == len(ip)
            assert internet_checksum(ip[:20]) == 0
        assert r.card.stats()["large_sends"] == bool(gso)


def test_offloads_are_done_from_the_start_and_when_switched_off() -> None:
    """Windows begins with them, and has frames under way when it switches them off."""
    frame = ip_frame(b"x" * 3000, seed="large")
    with rig(mtu=9000) as r:
        r.driver.initialize()
        for on in (1, 2, 1):
            for info in (
                element(LARGE_SEND, 1400 | 34 << 20 | 1 << 30),
                element(CHECKSUM, 34 << 16 | 5),
            ):
                assert r.driver.send(frame, info).wait() == 1
                assert r.link.get().offload.start == 34
            data = struct.pack("<BBH", 0x80, 3, 28) + bytes([1] * 5 + [0, 0, on, on])
            assert r.driver.set(OFFLOAD_PARAMETERS, data.ljust(28, b"\0")) == 0
        assert r.card.stats()["errors"] == {}


def test_the_guest_is_told_what_is_in_force_after_a_change() -> None:
    """Behind the answer to its wish, whatever became of that."""
    wish = struct.pack("<BBH", 0x80, 3, 28) + bytes([4, 2, 1, 4, 4, 0, 0, 2, 2]).ljust(24, b"\0")
    with rig(capabilities=Capabilities(True, True, False)) as r:
        r.driver.initialize()
        assert r.driver.set(OFFLOAD_PARAMETERS, wish) == 0
        assert r.driver.indications == []  # the answer comes first
        eventually_pumped(r, 1)
        on = struct.pack("<BBH6I", 0xA8, 1, 28, 1, 2, 14, 1, 2, 14)
        assert r.driver.set(0x0101010A, on) == 0
        eventually_pumped(r, 2)
        assert r.driver.indications == [0x40020006] * 2
        first, second = r.driver.indicated
        assert (len(first), first[:4]) == (156, struct.pack("<BBH", 0xA7, 3, 156))
        assert first != second == r.driver.query(0xFC01020B)
        assert r.driver.set(OFFLOAD_PARAMETERS, b"") != 0
        assert r.driver.set(0x0001010E, struct.pack("<I", 1)) == 0
        assert len(r.driver.indications) == 2


def eventually_pumped(r: Rig, count: int) -> None:
    while len(r.driver.indications) < count:
        r.driver.pump()


def test_offloads_outlive_a_halt() -> None:
    """Linux halts the card before it waits for what it has sent."""
    frame = ip_frame(b"x" * 3000, seed="large")
    info = element(LARGE_SEND, 1400 | 34 << 20 | 1 << 30)
    with rig(mtu=9000) as r:
        r.driver.initialize()
        switch_on(r.driver)
        assert r.driver.send_control(struct.pack("<III", 3, 12, 1)) == 1
        assert r.driver.send(frame, info).wait() == 1
        assert r.link.get().offload.gso == Gso.TCPV4


def test_a_link_that_can_do_nothing_is_believed() -> None:
    with rig(capabilities=Capabilities()) as r:
        r.driver.initialize()
        hardware = r.driver.query(0xFC01020D)
        assert not any(hardware[4:])
        data = struct.pack("<BBH", 0x80, 3, 28) + bytes([0, 4]).ljust(24, b"\0")
        assert r.driver.set(OFFLOAD_PARAMETERS, data) == 0
        assert not any(r.driver.query(0xFC01020B)[4:])
        assert r.link.wanted[-1] == Capabilities()


# -- frames from the world -------------------------------------------------------------------------


def test_frames_of_every_size_are_received() -> None:
    chance = random.Random(5)
    with rig(mtu=9000) as r:
        r.driver.initialize(mtu=9000)
        assert r.driver.receive_section == 9216
        for size in (14, 60, 1514, 4096, 9014, 9018):
            frame = ethernet(chance.randbytes(size - 14), to=MAC)
            r.link.put(frame)
            got = r.driver.receive()
            assert (got.data, got.info, got.parts) == (frame, {}, 1)


def test_waiting_frames_come_together_and_in_order() -> None:
    with rig() as r:
        r.driver.initialize()
        frames = [ethernet(struct.pack(">I", n) + bytes(50), to=MAC) for n in range(200)]
        r.link.ports[0].empty()  # nothing is taken meanwhile
        for frame in frames[:100]:
            r.link.put(frame)
        r.link.ports[0].put(r.link.card[0].fileno())
        r.link.changed()
        assert [r.driver.receive().data for _ in range(100)] == frames[:100]
        assert r.driver.transfer_packets < 20
        for frame in frames[100:]:
            r.link.put(frame)
        assert [r.driver.receive().data for _ in range(100)] == frames[100:]
        eventually(lambda: r.card.stats()["receive_sections_free"] == r.driver.receive_sections)


def test_frames_that_wait_for_space_in_the_ring() -> None:
    """The guest lets its ring run full, and then does nothing but empty it."""
    with rig(ring_pages=(17, 2)) as r:
        r.driver.initialize()
        time.sleep(0.1)  # the worker waits, for a frame that it waits in the engine after
        assert r.driver.send(ethernet()).wait() == 1
        frames = [ethernet(bytes([number]) * 60, to=MAC) for number in range(200)]
        for number, frame in enumerate(frames):
            r.link.put(frame)  # each in a packet of its own
            eventually(lambda taken=number + 1: r.card.stats()["received"]["frames"] == taken)
        assert [r.driver.receive().data for _ in frames] == frames
        assert r.guest.host is not None
        assert r.guest.host.stats()["totals"]["max_queued"] > 100


def test_the_packet_filter() -> None:
    with rig() as r:
        r.driver.initialize(packet_filter=0)
        r.link.put(ethernet(to=MAC))
        eventually(lambda: r.card.stats()["receive_filtered"] == 1)
        r.driver.set(0x0001010E, struct.pack("<I", 0x01))
        r.link.put(ethernet(b"no", to=b"\xff" * 6))
        r.link.put(ethernet(b"no", to=bytes.fromhex("020000000002")))
        r.link.put(ethernet(b"yes", to=MAC))
        assert r.driver.receive().data == ethernet(b"yes", to=MAC)
        r.driver.set(0x0001010E, struct.pack("<I", 0x20))
        r.link.put(ethernet(b"all", to=bytes.fromhex("020000000002")))
        assert r.driver.receive().data[14:] == b"all"
        assert r.card.stats()["receive_filtered"] == 3


@pytest.mark.parametrize("ip6", [False, True])
@pytest.mark.parametrize("udp", [False, True])
def test_received_checksums(udp: bool, ip6: bool) -> None:
    """Verified by somebody: said so. Left undone: done. Nothing known: nothing said."""
    good = 16 if udp else 8
    with rig() as r:
        r.driver.initialize()
        switch_on(r.driver)
        assert r.link.wanted[-1] == Capabilities(checksum=True)
        whole = ip_frame(b"data" * 300 + b"!", ip6=ip6, udp=udp, to=MAC)
        r.link.put(whole)
        assert r.driver.receive().info == {}
        r.link.put(whole, valid=True)
        assert r.driver.receive().info == {CHECKSUM: good}
        undone = ip_frame(b"data" * 300 + b"!", ip6=ip6, udp=udp, to=MAC, seed="pseudo")
        start = 54 if ip6 else 34
        r.link.put(undone, needs_checksum=True, start=start, offset=6 if udp else 16)
        got = r.driver.receive()
        assert got.data == whole
        assert got.info == {CHECKSUM: good}
        r.link.put(undone, needs_checksum=True, start=5000, offset=16)
        eventually(lambda: r.card.stats()["receive_errors"] == 1)


def test_a_strange_segment_is_dropped() -> None:
    """UDP fragments, say: somebody else's settings of a TAP may let them through."""
    with rig() as r:
        r.driver.initialize()
        r.link.put(ethernet(b"strange", to=MAC), gso=3, segment=1400)
        r.link.put(ethernet(b"plain", to=MAC))
        assert r.driver.receive().data == ethernet(b"plain", to=MAC)
        assert r.card.stats()["receive_errors"] == 1


def test_a_tag_comes_beside_the_frame_if_the_guest_can() -> None:
    plain = ip_frame(b"x" * 60, to=MAC)
    tagged = ip_frame(b"x" * 60, to=MAC, tag=0xA123)
    for capabilities in (VLAN_CAPABLE, 0):
        with rig() as r:
            r.driver.initialize(capabilities=capabilities)
            r.link.put(tagged)
            got = r.driver.receive()
            if capabilities:
                assert got.data == plain
                assert got.info == {VLAN: 5 | 0x123 << 4}
            else:
                assert (got.data, got.info) == (tagged, {})


@pytest.mark.parametrize("size", [1000, 16000, 30000, 65000])
@pytest.mark.parametrize("tag", [None, 9])
def test_a_coalesced_frame_takes_several_sections(size: int, tag: int | None) -> None:
    data = random.Random(size).randbytes(size)
    with rig() as r:
        r.driver.initialize(capabilities=VLAN_CAPABLE | RSC_CAPABLE, receive_bytes=2 << 20)
        switch_on(r.driver, rsc=2)
        assert r.link.wanted[-1] == EVERYTHING
        frame = ip_frame(data, to=MAC, tag=tag)
        start = 34 if tag is None else 38
        r.link.put(frame, needs_checksum=True, start=start, offset=16, gso=1, segment=1400)
        got = r.driver.receive()
        assert got.data == ip_frame(data, to=MAC)
        assert got.info == {CHECKSUM: 8} | ({VLAN: 9 << 4} if tag else {})
        assert got.parts == -(-len(frame) // (13312 - 112 - 36))
        assert r.card.stats()["coalesced"] == (got.parts > 1)
        switch_on(r.driver, rsc=1)
        assert r.link.wanted[-1] == Capabilities(checksum=True)
        r.link.put(ethernet(to=MAC))
        assert r.driver.receive().parts == 1


def test_a_frame_may_lie_anywhere_in_translated_code() -> None:
    """Under translation, the pages of a section are looked up before the guest is told."""
    with rig(code_map=True) as r:
        r.driver.initialize()
        assert r.guest.code_map is not None
        assert r.driver.receive_gpadl is not None
        before = len(r.guest.invalidations)
        for pfn in r.driver.receive_gpadl.owned_pfns:
            r.guest.code_map.mark(pfn)
        r.link.put(ethernet(b"z" * 1400, to=MAC))
        assert r.driver.receive().data == ethernet(b"z" * 1400, to=MAC)
        found = r.guest.invalidations[before:]
        assert 1 <= sum(size // 4096 for ranges in found for _, size in ranges) <= 2
