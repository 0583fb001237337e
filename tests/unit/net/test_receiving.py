# SPDX-License-Identifier: GPL-2.0-or-later
"""What the data path does with a frame for the guest: whether it is wanted, its hash, its checksum.

There is no channel that could be told of it, so what was put into the section stays there to be
looked at.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.net_codec import MAC, adapter
from tests.support.ram import Ram, scattered
from tests.support.vnet import Offload
from vhostvmbus.devices.net import oids, rss
from vhostvmbus.devices.net.buffers import FRAME_OFFSET, ReceiveBuffer
from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.devices.net.link.port import Framing, Port
from vhostvmbus.wire.gpa import GpaRange

SIZE, HASH = 2048, 8
GROUP, JOINED = bytes.fromhex("01005e000001"), bytes.fromhex("333300000001")
PROMISCUOUS = 0x20


class World:
    """A data path with a receive buffer and a link, and the link's other end."""

    def __init__(self) -> None:
        self.ram = Ram()
        self.memory = self.ram.memory()
        self.mapping = self.memory.external_data([GpaRange.of_pages(scattered(16))])
        self.path = DataPath()
        ours, self.world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self.port = Port(Framing.DATAGRAM)
        self.port.put(ours.fileno())
        ours.close()
        self.path.use_ports([self.port])
        self.buffer = ReceiveBuffer(self.mapping, 1, SIZE, self.path)
        self.path.lend_receive(self.buffer)
        self.always = os.eventfd(1, os.EFD_SEMAPHORE)
        self.state = adapter()
        self.state.packet_filter = PROMISCUOUS

    def put(self, frame: bytes, offload: Offload | None = None) -> None:
        """A frame comes, by the settings of now."""
        self.path.configure(self.state, tagging=False, active=True, receiving=True)
        self.world.send((offload or Offload()).pack() + frame)
        served = self.path.serve(0, self.always)
        assert served.woken
        assert served.left == []

    def is_taken(self, frame: bytes, offload: Offload | None = None) -> bool:
        """Whether a frame would have got to the guest."""
        before = self.path.received()
        self.put(frame, offload)
        now = self.path.received()
        taken = now.received.frames - before.received.frames
        dropped = now.receive_filtered + now.receive_errors
        assert taken + dropped - before.receive_filtered - before.receive_errors == 1
        assert now.receive_no_buffer - before.receive_no_buffer == taken  # there is no channel
        return bool(taken)

    def section(self, length: int) -> tuple[dict[int, int], bytes]:
        """Per-packet information and the first bytes of the frame in the section that is next."""
        head = self.mapping.read(self.buffer.reserve * SIZE, FRAME_OFFSET + length)
        _, _, offset, size, _, _, _, info_at, info_size = struct.unpack_from("<9I", head)
        assert size >= length
        infos = {}
        for at in range(8 + info_at, 8 + info_at + info_size, 16):
            assert struct.unpack_from("<I4xI", head, at) == (16, 12)
            kind, value = struct.unpack_from("<4xI4xI", head, at)
            infos[kind] = value
        return infos, head[8 + offset : 8 + offset + length]

    def close(self) -> None:
        self.path.take_back(True)
        self.mapping.close()
        self.memory.close()
        self.ram.close()
        self.port.close()
        self.world.close()
        os.close(self.always)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def to(address: bytes) -> bytes:
    return address + bytes(54)


# -- the place of a frame --------------------------------------------------------------------------


def test_the_end_of_a_section_is_left_alone(world: World) -> None:
    """The longest frame ends 36 bytes in front of it; a longer one is none of this guest's."""
    tail = bytes(range(36))
    end = (world.buffer.reserve + 1) * SIZE
    world.mapping.write(tail, end - 36)
    longest = SIZE - FRAME_OFFSET - 36
    frame = bytes(12) + b"\x88\xb5" + b"\xff" * (longest - 14)
    assert world.is_taken(frame)
    assert world.section(longest)[1] == frame
    assert not world.is_taken(frame + b"\xff")
    assert world.mapping.read(end - 36, 36) == tail


# -- the packet filter -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0x10, set()),
        (0x01, {"own"}),
        (0x02, {"joined"}),
        (0x04, {"joined", "group"}),
        (0x08, {"broadcast"}),
        (0x0D, {"own", "broadcast", "group", "joined"}),
        (0x20, {"own", "other", "broadcast", "group", "joined"}),
    ],
)
def test_the_filter(world: World, value: int, wanted: set[str]) -> None:
    frames = {
        "own": MAC,
        "other": MAC[:5] + b"\x02",
        "broadcast": b"\xff" * 6,
        "group": GROUP,
        "joined": JOINED,
    }
    oids.set_value(world.state, 0x01010103, JOINED)
    oids.set_value(world.state, 0x0001010E, struct.pack("<I", value))
    assert {name for name, address in frames.items() if world.is_taken(to(address))} == wanted


def test_both_addresses_are_the_cards(world: World) -> None:
    new = bytes.fromhex("0a0b0c0d0e0f")
    world.state.packet_filter = 1
    oids.set_value(world.state, 0x01010102, new)
    assert world.is_taken(to(new))
    assert world.is_taken(to(MAC))
    oids.set_value(world.state, 0x01010102, MAC)
    assert not world.is_taken(to(new))


# -- the hash --------------------------------------------------------------------------------------

KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa"
)
VECTORS4 = [
    ("161.142.100.80", 1766, "66.9.149.187", 2794, 0x323E8FC2, 0x51CCC178),
    ("65.69.140.83", 4739, "199.92.111.2", 14230, 0xD718262A, 0xC626B0EA),
    ("12.22.207.184", 38024, "24.19.198.95", 12898, 0xD2D0A5DE, 0x5C2B394A),
    ("209.142.163.6", 2217, "38.27.205.30", 48228, 0x82989176, 0xAFC7327F),
    ("202.188.127.2", 1303, "153.39.163.191", 44251, 0x5D1809C5, 0x10E828A2),
]
VECTORS6 = [
    ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2CC18CD5, 0x40207D3D),
    ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0F0C461C, 0xDDE51BBF),
    (
        "fe80::200:f8ff:fe21:67cf", 38024, "3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251,
        0x4B61E985, 0x02D1FEEF,
    ),
]  # fmt: skip
"""Destination, port, source, port, hash of the addresses, hash with the ports: from Microsoft's
*Verifying the RSS Hash Calculation*."""
ADDRESSES, WITH_PORTS = 0x100 | 0x400, 0x200 | 0x1000


def hashed_frame(source: str, source_port: int, target: str, port: int, tagged: bool) -> bytes:
    family = socket.AF_INET6 if ":" in source else socket.AF_INET
    addresses = socket.inet_pton(family, source) + socket.inet_pton(family, target)
    tcp = struct.pack(">HH", source_port, port) + bytes(16)
    if family == socket.AF_INET6:
        body = b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, 20, 6, 64) + addresses + tcp
    else:
        body = b"\x08\0" + struct.pack(">BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + addresses + tcp
    return bytes(12) + (b"\x81\0\0\x05" if tagged else b"") + body


def hash_of(world: World, frame: bytes, types: int) -> int | None:
    world.state.scaling.current = rss.Scaling(types, (0, 1, 2, 3), KEY, enabled=True)
    assert world.is_taken(frame)
    return world.section(len(frame))[0].get(HASH)


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize(
    ("target", "port", "source", "source_port", "plain", "full"), VECTORS4 + VECTORS6
)
def test_the_hash(
    world: World,
    target: str,
    port: int,
    source: str,
    source_port: int,
    plain: int,
    full: int,
    tagged: bool,
) -> None:
    data = hashed_frame(source, source_port, target, port, tagged)
    assert hash_of(world, data, ADDRESSES) == plain
    assert hash_of(world, data, ADDRESSES | WITH_PORTS) == full
    assert hash_of(world, data, WITH_PORTS) == full
    assert hash_of(world, data, 0) is None
    assert hash_of(world, bytes(60), ADDRESSES | WITH_PORTS) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=100),
    st.sampled_from([b"\x08\0\x45", b"\x86\xdd\x60", b"\x81\0\0\5\x08\0\x4f", b""]),
    st.integers(0, 0xFFFFFFFF),
)
def test_any_frame_is_taken_as_it_is(world: World, data: bytes, kind: bytes, types: int) -> None:
    frame = bytes(12) + kind + data.ljust(2, b"\0")
    hash_of(world, frame, types)
    infos, seen = world.section(len(frame))
    assert seen == frame
    assert set(infos) <= {HASH}


# -- checksums that were left undone ---------------------------------------------------------------


@pytest.mark.parametrize("size", [42, 43, 110, 111, 1800])
def test_a_checksum_is_completed(world: World, size: int) -> None:
    """Over all of the frame, wherever in the section it lies; an odd last byte is half a word."""
    frame = bytes(number * 7 & 0xFF for number in range(size))
    assert world.is_taken(frame, Offload(needs_checksum=True, start=34, offset=4))
    _, seen = world.section(size)
    assert seen[:38] + seen[40:] == frame[:38] + frame[40:]
    words = struct.unpack(f">{(size - 34 + 1) // 2}H", frame[34:] + bytes(size % 2))
    (value,) = struct.unpack(">H", seen[38:40])
    assert (sum(words) + value) % 0xFFFF == 0


def test_a_datagram_never_has_the_checksum_0(world: World) -> None:
    """That would say that there is none."""
    frame = bytes(34) + b"\xff\xff" + bytes(6)
    assert world.is_taken(frame, Offload(needs_checksum=True, start=34, offset=6))
    assert world.section(42)[1][40:] == b"\xff\xff"


@pytest.mark.parametrize(("start", "offset"), [(0, 16), (100, 0), (34, 65), (60000, 0)])
def test_a_checksum_that_cannot_be(world: World, start: int, offset: int) -> None:
    offload = Offload(needs_checksum=True, start=start, offset=offset)
    assert not world.is_taken(bytes(100), offload)
