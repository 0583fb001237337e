# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card with a driver as particular as Windows': it takes no message of another length,
sets offloads in its own ways and uses them before that, and has the end of each section itself."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import pytest

from tests.support.net_card import (
    EVERYTHING,
    MAC,
    Rig,
    SocketLink,
    StreamLink,
    ethernet,
    ip_frame,
    rig,
)
from tests.support.vnet import Gso
from vhostvmbus.devices.net import NetworkCard, leaving
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.netvsc import (
    CHECKSUM,
    LARGE_SEND,
    RSC_CAPABLE,
    VERSIONS,
    VLAN_CAPABLE,
    BadNetPacket,
    element,
    packet_message,
)
from vhostvmbus.guest.netvsc_windows import KEYWORDS, WindowsNetvsc

SECTIONS = 64 * 1728
NOT_SUPPORTED = 0xC00000BB


class WindowsRig(Rig):
    """A card, and a guest with Windows' driver."""

    driver: WindowsNetvsc


@contextlib.contextmanager
def windows(**options: object) -> Iterator[WindowsRig]:
    with rig(**options) as r:  # type: ignore[arg-type]
        r.driver = WindowsNetvsc(r.guest, r.channel)
        r.__class__ = WindowsRig
        assert isinstance(r, WindowsRig)
        yield r


def large(segment: int = 1400) -> bytes:
    return element(LARGE_SEND, segment | 34 << 20 | 1 << 30)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version(version: int) -> None:
    """Answers, packets with frames, and completions of both ways of a frame to the link."""
    with windows() as r:
        r.driver.initialize(versions=[version], receive_bytes=SECTIONS)
        assert r.driver.nvsp(103, struct.pack("<H", 0xCAFE)) == b""
        assert r.driver.nvsp(101, struct.pack("<IH", 1, 1))[:8] == struct.pack("<II", 102, 2)
        r.driver.lend_receive_buffer(SECTIONS)
        for frame in (ethernet(b"x" * 1400), ethernet()):
            assert r.driver.send(frame).wait() == 1
            assert r.link.get().frame == frame
        r.card._channels[0].set_plan(None)
        assert r.driver.send(ethernet(b"by hand")).wait() == 1
        assert r.driver.send_many([bytes(3)]).wait() == 5
        for size in (0, 46, 1500, 1504):
            r.link.put(ethernet(b"z" * size, to=MAC))
            assert r.driver.receive().data == ethernet(b"z" * size, to=MAC)
        if version >= 0x50000:
            answer = r.driver.nvsp(131, struct.pack("<BBHI", 0x80, 1, 8, 0x00010107))
            assert struct.unpack_from("<III", answer) == (132, NOT_SUPPORTED, 0)
        if version >= 0x60000:
            answer = r.driver.nvsp(135, struct.pack("<I", 1))
            assert struct.unpack_from("<III", answer) == (135, 1, NOT_SUPPORTED)
        assert r.card.stats()["errors"] == {"RndisError": 1, "SectionError": 1}


@pytest.mark.parametrize("version", [0x60001, 0x60000, 0x50000])
def test_subchannels_and_the_send_table(version: int) -> None:
    with windows(queues=4) as r:
        r.driver.initialize(versions=[version], receive_bytes=SECTIONS)
        assert r.driver.subchannels(3) == 3
        for index in (1, 2, 3):
            r.guest.wait_for_offer(index)
            r.driver.channels[index] = r.guest.enable(index)
        while not r.driver.send_table:
            r.driver.pump()
        assert r.driver.send_table == tuple(number % 4 for number in range(16))
        for index in range(4):
            assert r.driver.send(ethernet(bytes([index])), channel=index).wait() == 1
            assert r.link.get(index).frame == ethernet(bytes([index]))


@pytest.mark.parametrize("mtu", [1500, 4000, 9000])
def test_the_longest_frames_leave_the_end_of_a_section_alone(mtu: int) -> None:
    with windows(mtu=mtu) as r:
        r.driver.initialize(mtu=mtu, receive_bytes=64 * (mtu + 228))
        for size in (mtu - 37, mtu - 36, mtu - 1, mtu, mtu + 4):
            r.link.put(ethernet(bytes([size & 0xFF]) * size, to=MAC))
            assert r.driver.receive().data == ethernet(bytes([size & 0xFF]) * size, to=MAC)


def test_coalesced_segments_leave_it_alone_too() -> None:
    with windows() as r:
        r.driver.initialize(capabilities=VLAN_CAPABLE | RSC_CAPABLE, receive_bytes=16 * 13312)
        assert r.link.wanted[-1] == Capabilities(checksum=True)  # not before it is asked for
        r.driver.wish(*[0] * 11, rsc=2)
        assert r.link.wanted[-1] == EVERYTHING
        frame = ip_frame(bytes(range(250)) * 260, to=MAC)
        r.link.put(frame, needs_checksum=True, start=34, offset=16, gso=1, segment=1400)
        got = r.driver.receive()
        assert (got.data, got.parts) == (frame, 5)


def test_offloads_are_used_before_they_are_asked_for() -> None:
    with windows() as r:
        r.driver.initialize(receive_bytes=SECTIONS, keywords={})
        frame = ip_frame(b"x" * 5000, seed="large")
        assert r.driver.send(frame, large(), pages=True).wait() == 1
        assert r.link.get().offload.gso == Gso.TCPV4
        for versions in (0, 1, 3):  # neither, IPv4, both
            info = element(CHECKSUM, versions | 4 | 34 << 16)
            assert r.driver.send(ip_frame(b"x", seed="pseudo"), info).wait() == 1
            assert r.link.get().offload.needs_checksum
        assert r.card.stats()["errors"] == {}


def test_settings_are_kept_to_what_there_is() -> None:
    """Keywords, encapsulation and a wish for everything, in the order of a start and after it."""
    with windows(capabilities=Capabilities(True, False, True)) as r:
        r.driver.initialize(
            receive_bytes=SECTIONS, keywords={**KEYWORDS, "*TCPChecksumOffloadIPv6": "0"}
        )
        offered = r.driver.query(0xFC01020D)
        now = r.driver.query(0xFC01020B)
        assert now != offered  # a keyword has switched something off
        assert r.driver.encapsulate() == now
        assert r.driver.wish(4, 4, 4, 4, 4, 2, 4, 2, 2, 4, 4, rsc=2) == offered
        nothing = r.driver.wish(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, rsc=1)
        assert not any(nothing[4:])
        assert r.driver.set_keyword("*LsoV2IPv6", "1") == 0
        assert r.driver.query(0xFC01020B) not in (nothing, offered)
        for name, value in (("*LsoV2IPv6", "on"), ("*LsoV2IPv6", "")):
            assert r.driver.set_keyword(name, value) == 0xC0010015
        assert r.driver.send(ip_frame(b"x" * 4000, seed="large"), large()).wait() == 5  # no TSO
        info = element(CHECKSUM, 5 | 34 << 16)
        assert r.driver.send(ip_frame(b"x", seed="pseudo"), info).wait() == 1  # off, but there


def test_a_link_without_offloads() -> None:
    with windows(link=StreamLink()) as r:
        r.driver.initialize(receive_bytes=SECTIONS)
        assert not any(r.driver.wish(4, 4, 4, 4, 4, 2, 4, 2, 2)[4:])
        assert r.driver.send(ethernet(b"plain")).wait() == 1
        assert r.link.get().frame == ethernet(b"plain")


def test_a_send_goes_on_in_the_next_section() -> None:
    with windows(mtu=9000) as r:
        r.driver.initialize(mtu=9000, receive_bytes=64 * 9216)
        assert r.driver.send_gpadl is not None
        frame = ethernet(bytes(range(250)) * 36)
        message = packet_message(frame)
        assert len(message) > r.driver.send_section
        section = 5 * r.driver.send_section
        r.guest.ram.write(r.driver.send_gpadl.owned_pfns, message, section)
        body = struct.pack("<IIII", 107, 0, 5, len(message)).ljust(40, b"\0")
        assert struct.unpack_from("<II", r.channel.send(body)) == (108, 1)
        assert r.link.get().frame == frame


def test_another_back_end_speaks_to_it_in_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not know the version; a note of the one before has the length of messages."""
    monkeypatch.setattr(leaving, "LINK_CHANGE_SECONDS", 0.0)  # this driver acts at once
    first, second = NetworkCard(SocketLink()), NetworkCard(SocketLink())
    with serving(second) as (_, path, _), SoftwareGuest.for_device(first) as guest:
        driver = WindowsNetvsc(guest, guest.enable(0))
        driver.initialize(versions=[0x50000], receive_bytes=SECTIONS)
        guest.reconnect(path)
        driver.pump()
        assert driver.indications[-1] == 0x4001000C
        assert driver.send(ethernet()).wait() != 1
        guest.disconnect()
    first.close()
    second.close()


def test_the_driver_notices() -> None:
    """What the card does not do any more."""
    with windows() as r:
        r.driver.initialize(versions=[0x60000], receive_bytes=SECTIONS)
        r.driver.version = 0x60001
        with pytest.raises(BadNetPacket, match="not 40"):
            r.driver.send(ethernet()).wait()
        r.driver.version = 0x60000
        with pytest.raises(BadNetPacket, match="0xc0010015"):
            r.driver.wish(9)
        assert r.driver.receive_gpadl is not None
        whole = bytes(len(r.driver.receive_gpadl.owned_pfns) * 4096)
        r.guest.ram.write(r.driver.receive_gpadl.owned_pfns, whole)
        r.link.put(ethernet(to=MAC))
        with pytest.raises(BadNetPacket, match="was written"):
            r.driver.receive()
