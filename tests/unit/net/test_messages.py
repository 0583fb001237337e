# SPDX-License-Identifier: GPL-2.0-or-later
"""RNDIS packet messages of a guest, as the data path reads them: the frame that comes out, with
what the link has still to do, or the mistake, with its field, value and offset."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.net_card import internet_checksum
from tests.support.net_codec import adapter
from tests.support.vnet import HEADER, Gso, Offload
from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.devices.net.errors import FrameError, NetError, PacketInfoError, RndisError
from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.link.port import Framing, Port
from vhostvmbus.devices.net.offloads import Offloads

CHECKSUM, LARGE_SEND, VLAN, HASH = 0, 2, 6, 8
INTERNAL = 1 << 31
LONGEST = 9000
ANY = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


class Way:
    """A data path with a link, and the link's other end."""

    def __init__(self) -> None:
        ours, self._world = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._world.setblocking(False)
        ours.setblocking(False)
        self._port = Port(Framing.DATAGRAM)
        self._port.put(ours.fileno())
        ours.close()
        self._path = DataPath()
        self._path.use_ports([self._port])
        self.switch_on(Offloads(*(True,) * 13))

    def switch_on(self, offloads: Offloads) -> None:
        self.able(Capabilities(True, True, True), offloads)

    def able(self, capabilities: Capabilities, offloads: Offloads | None = None) -> None:
        """The link can do that, whatever is switched on."""
        state = adapter(capabilities)
        state.mtu, state.offloads = LONGEST, offloads or Offloads()
        self._path.configure(state, tagging=False, active=True, receiving=False)

    def send(self, data: bytes) -> list[tuple[Offload, bytes]]:
        """The frames of a packet, with their headers. Raises what is wrong with it."""
        try:
            self._path.send(0, data)
        finally:
            self.frames = self._frames()
        return self.frames

    def _frames(self) -> list[tuple[Offload, bytes]]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._world.recv(1 << 17)
                found.append((Offload.unpack(data), data[HEADER.size :]))
        return found

    def close(self) -> None:
        self._port.close()
        self._world.close()


@pytest.fixture
def way() -> Iterator[Way]:
    way = Way()
    yield way
    way.close()


def wrong(way: Way, data: bytes) -> tuple[type[NetError], str, int, int]:
    """What is wrong with a packet."""
    with pytest.raises(NetError) as caught:
        way.send(data)
    error = caught.value
    return type(error), error.field, error.value, error.offset


def element(kind: int, value: int) -> bytes:
    return struct.pack("<IIII", 16, kind, 12, value)


def packet(
    frame: bytes | int = 60,
    info: bytes = b"",
    *,
    kind: int = 1,
    length: int | None = None,
    data_offset: int | None = None,
    data_length: int | None = None,
    oob: tuple[int, int] = (0, 0),
    info_offset: int = 36,
    info_length: int | None = None,
) -> bytes:
    body = bytes(frame) if isinstance(frame, int) else frame
    head = 44 + len(info)
    fields = (
        kind, head + len(body) if length is None else length,
        head - 8 if data_offset is None else data_offset,
        len(body) if data_length is None else data_length, *oob, 0, info_offset,
        len(info) if info_length is None else info_length, 0, 0,
    )  # fmt: skip
    return struct.pack("<11I", *fields) + info + body


# -- messages --------------------------------------------------------------------------------------


def test_messages_one_after_the_other(way: Way) -> None:
    plain = bytes(range(60))
    padded = packet(plain + b"pad", data_length=60)
    late = packet(b"gap" + plain, element(HASH, 5), data_offset=44 + 16 - 8 + 3, data_length=60)
    out_of_band = packet(plain + bytes(8), oob=(96, 8), data_length=60)
    assert way.send(packet(plain) + padded + late + out_of_band) == [(Offload(), plain)] * 4


@pytest.mark.parametrize(
    ("data", "field", "value", "offset"),
    [
        (b"", "length", 0, 0),
        (packet()[:7], "length", 7, 0),
        (struct.pack("<II", 1, 7) + bytes(20), "msg_len", 7, 4),
        (struct.pack("<II", 1, 29) + bytes(20), "msg_len", 29, 4),
        (struct.pack("<II", 1, 28) + bytes(20), "msg_len", 28, 4),
        (packet(length=105), "msg_len", 105, 4),
        (packet(length=7), "msg_len", 7, 4),
        (packet(length=43), "msg_len", 43, 4),
        (packet(length=0xFFFFFFFF), "msg_len", 0xFFFFFFFF, 4),
        (packet(data_offset=27), "data_offset", 27, 8),
        (packet(data_offset=97), "data_offset", 97, 8),
        (packet(data_offset=0xFFFFFFFC), "data_offset", 0xFFFFFFFC, 8),
        (packet(data_length=61), "data_len", 61, 12),
        (packet(data_length=0xFFFFFFFF), "data_len", 0xFFFFFFFF, 12),
        (packet(oob=(0, 4)), "oob_data_len", 4, 20),
        (packet(oob=(27, 4)), "oob_data_len", 4, 20),
        (packet(oob=(97, 0)) + packet(oob=(97, 1)), "oob_data_len", 1, 20),
        (packet(oob=(40, 0xFFFFFFFF)), "oob_data_len", 0xFFFFFFFF, 20),
        (packet(info_length=4, info_offset=27), "per_pkt_info_offset", 27, 28),
        (packet(info_length=4, info_offset=97), "per_pkt_info_offset", 97, 28),
        (packet(info_length=61, info_offset=36), "per_pkt_info_len", 61, 32),
        (packet(kind=2), "ndis_msg_type", 2, 0),
        (packet(kind=INTERNAL | 1), "ndis_msg_type", INTERNAL | 1, 0),
    ],
)
def test_a_message_that_lies(way: Way, data: bytes, field: str, value: int, offset: int) -> None:
    assert wrong(way, data) == (RndisError, field, value, offset)


def test_reserved_words_need_not_be_there(way: Way) -> None:
    """A frame, or what stands beside it, may begin wherever no field in use ends later: iPXE of
    2019 has a header of 40 bytes, with one reserved word."""
    frame = bytes(range(60))
    for start in (36, 40, 41):
        fields = (1, start + 60, start - 8, 60, 0, 0, 0, 0, 0)
        message = struct.pack("<9I", *fields).ljust(start, b"\xee") + frame
        assert way.send(message * 2) == [(Offload(), frame)] * 2
    tag = element(VLAN, 0x123 << 4)
    message = struct.pack("<9I", 1, 36 + 16 + 60, 36 + 16 - 8, 60, 0, 0, 0, 28, 16) + tag + frame
    assert way.send(message) == [(Offload(), frame[:12] + b"\x81\0\x01\x23" + frame[12:])]


def test_what_came_before_a_mistake_is_sent(way: Way) -> None:
    good = packet(b"good" * 15)
    assert wrong(way, good * 2 + packet(b"short") + good) == (FrameError, "data_len", 5, 12)
    assert [frame for _, frame in way.frames] == [b"good" * 15] * 2
    small = packet(14)
    assert wrong(way, small * 65) == (RndisError, "messages", 65, 64 * len(small))
    assert len(way.frames) == 64


@pytest.mark.parametrize("size", [0, 13, LONGEST + 14 + 4 + 1])
def test_a_frame_that_has_an_impossible_length(way: Way, size: int) -> None:
    assert wrong(way, packet(size)) == (FrameError, "data_len", size, 12)


@ANY
@given(st.lists(st.integers(0, 200) | st.integers(0, 2**32 - 1), min_size=11, max_size=11))
def test_any_packet_fields(way: Way, fields: list[int]) -> None:
    """What comes out was in the message."""
    fields[0] = 1
    data = struct.pack("<11I", *fields) + bytes(range(136))
    with contextlib.suppress(NetError):
        way.send(data)
    for _, frame in way.frames:
        assert frame in data


# -- per-packet information ------------------------------------------------------------------------


def test_a_chain(way: Way) -> None:
    """What is understood is found among what is not; data may be far from its header."""
    chain = (
        struct.pack("<III", 12, 3, 12)
        + struct.pack("<IIIIII", 24, VLAN, 20, 0, 0, 7 | 0x123 << 4)
        + element(INTERNAL | CHECKSUM, 99)
        + element(HASH, 0xFFFFFFFF)
    )
    frame = bytes(range(60))
    tagged = frame[:12] + b"\x81\0\xe1\x23" + frame[12:]
    assert way.send(packet(frame, chain)) == [(Offload(), tagged)]


@pytest.mark.parametrize(
    ("chain", "field", "value", "offset"),
    [
        (bytes(11), "size", 11, 0),
        (struct.pack("<III", 0, 0, 12), "size", 0, 0),
        (struct.pack("<III", 11, 0, 12), "size", 11, 0),
        (struct.pack("<IIII", 17, 0, 12, 0), "size", 17, 0),
        (struct.pack("<IIII", 0xFFFFFFFF, 0, 12, 0), "size", 0xFFFFFFFF, 0),
        (struct.pack("<IIII", 16, 0, 11, 0), "ppi_offset", 11, 8),
        (struct.pack("<IIII", 16, 0, 17, 0), "ppi_offset", 17, 8),
        (struct.pack("<IIII", 16, 0, 13, 0), "size", 16, 0),
        (struct.pack("<III", 12, 2, 12), "size", 12, 0),
        (element(3, 1) + element(HASH, 1) + element(HASH, 1), "type", HASH, 36),
        (element(VLAN, 1) + b"\0", "size", 1, 16),
        (element(3, 0) * 65, "per_pkt_info_len", 1040, 32),
    ],
)
def test_a_chain_that_lies(way: Way, chain: bytes, field: str, value: int, offset: int) -> None:
    assert wrong(way, packet(60, chain)) == (PacketInfoError, field, value, offset)


@ANY
@given(st.binary(max_size=200))
def test_any_chain(way: Way, data: bytes) -> None:
    with contextlib.suppress(NetError):
        way.send(packet(60, data))


@ANY
@given(st.integers(0, 0xFFFFFFFF))
def test_a_tag(way: Way, value: int) -> None:
    """NDIS has priority in bits 0-2, CFI in bit 3, the id in bits 4-15: the wire the other way."""
    (_, frame) = way.send(packet(bytes(range(60)), element(VLAN, value)))[0]
    (tag,) = struct.unpack(">H", frame[14:16])
    assert frame[:14] + frame[16:] == bytes(range(12)) + b"\x81\0" + bytes(range(12, 60))
    assert (tag >> 13, tag >> 12 & 1, tag & 0xFFF) == (
        value & 7,
        value >> 3 & 1,
        value >> 4 & 0xFFF,
    )


# -- frames' headers -------------------------------------------------------------------------------

ETHERNET = bytes(12)
IPV4, IPV6, TCP, UDP, IP_HEADER = 1, 2, 4, 8, 16


def left(flags: int, start: int = 34) -> bytes:
    """A checksum that is left to be computed."""
    return element(CHECKSUM, flags | start << 16)


def large(
    segment: int = 1000, start: int = 34, *, version2: bool = True, ip6: bool = False
) -> bytes:
    """A segment that is to be cut."""
    return element(LARGE_SEND, segment | start << 20 | version2 << 30 | ip6 << 31)


def ip4_frame(payload: int = 100, ihl: int = 5, doff: int = 5) -> bytes:
    ip = struct.pack(">BBHHHBBH8s", 0x40 | ihl, 0, 0, 0, 0, 64, 6, 0xDEAD, bytes(range(1, 9)))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, doff << 4, 0, 0, 0xBEEF, 0)
    options = bytes(ihl * 4 - 20), bytes(max(0, doff * 4 - 20))
    return ETHERNET + b"\x08\0" + ip + options[0] + tcp + options[1] + bytes(payload)


def test_a_checksum_to_be_done(way: Way) -> None:
    data = ip4_frame()
    assert way.send(packet(data, left(IPV4 | TCP))) == [(Offload(True, False, 34, 16), data)]
    assert way.send(packet(data, left(IPV4 | UDP, 0))) == [(Offload(True, False, 34, 6), data)]
    ((offload, frame),) = way.send(packet(data, left(IPV4 | IP_HEADER)))
    assert offload == Offload()
    assert internet_checksum(frame[14:34]) == 0
    assert frame[:24] + frame[26:] == data[:24] + data[26:]


def test_the_frame_says_which_ip_it_is_if_the_guest_says_neither_or_both(way: Way) -> None:
    data = ip4_frame()
    for both in (0, IPV4 | IPV6):
        assert way.send(packet(data, left(both | TCP))) == [(Offload(True, False, 34, 16), data)]
        ((offload, frame),) = way.send(packet(data, left(both | IP_HEADER)))
        assert (offload, internet_checksum(frame[14:34])) == (Offload(), 0)
        ip6 = ETHERNET + b"\x86\xdd\x60" + bytes(39) + bytes(20)
        assert way.send(packet(ip6, left(both | UDP, 0))) == [(Offload(True, False, 54, 6), ip6)]
        plain = ETHERNET + b"\x08\x06" + bytes(46)
        assert way.send(packet(plain, left(both, 0))) == [(Offload(), plain)]
        for wanted in (TCP, UDP, IP_HEADER):
            found = wrong(way, packet(plain, left(both | wanted, 0)))
            assert found == (FrameError, "ethertype", 0x0806, 12)


@pytest.mark.parametrize(
    ("wanted", "field", "value", "offset"),
    [
        (left(IPV6 | TCP), "ethertype", 0x0800, 12),
        (left(IPV4 | TCP | UDP), "transmit", 12, 0),
        (left(IPV4 | TCP, 33), "tcp_header_offset", 33, 0),
        (left(IPV4 | TCP, 135), "tcp_header_offset", 135, 0),
        (left(IPV4 | UDP, 147), "tcp_header_offset", 147, 0),
        (left(IPV4 | TCP, 1023), "tcp_header_offset", 1023, 0),
    ],
)
def test_a_checksum_that_cannot_be_done(
    way: Way, wanted: bytes, field: str, value: int, offset: int
) -> None:
    assert wrong(way, packet(ip4_frame(), wanted)) == (FrameError, field, value, offset)


ALL_WANTED = [
    left(IPV4 | TCP), left(IPV4 | UDP), left(IPV4 | IP_HEADER), left(IPV6 | TCP, 54),
    left(IPV6 | UDP, 54), large(), large(start=54, ip6=True),
]  # fmt: skip


@pytest.mark.parametrize("wanted", ALL_WANTED)
def test_what_is_switched_off_is_done_all_the_same(way: Way, wanted: bytes) -> None:
    """The guest's stack may have asked for it just before."""
    ip6 = ETHERNET + b"\x86\xdd\x60" + bytes(39) + bytes(12) + b"\x50" + bytes(107)
    kind, value = struct.unpack("<4xI4xI", wanted)
    frame = ip6 if value & (IPV6 if kind == CHECKSUM else 1 << 31) else ip4_frame()
    way.switch_on(Offloads())
    assert len(way.send(packet(frame, wanted))) == 1


@pytest.mark.parametrize(
    ("able", "refused"),
    [
        (Capabilities(), ALL_WANTED),
        (Capabilities(True), [large(), large(ip6=True)]),
        (Capabilities(True, True, False), [large(ip6=True)]),
        (Capabilities(True, False, True), [large()]),
        (Capabilities(False, True, True), ALL_WANTED),
    ],
)
def test_what_the_link_cannot_do_is_refused(
    way: Way, able: Capabilities, refused: list[bytes]
) -> None:
    way.able(able, Offloads(*(True,) * 13))
    for wanted in refused:
        (kind, value) = struct.unpack("<4xI4xI", wanted)
        field = "transmit" if kind == CHECKSUM else "type"
        assert wrong(way, packet(ip4_frame(), wanted)) == (FrameError, field, value, 0)


@pytest.mark.parametrize(("ihl", "doff"), [(5, 5), (5, 8), (15, 15), (6, 5)])
def test_a_large_send(way: Way, ihl: int, doff: int) -> None:
    start = 14 + ihl * 4
    data = ip4_frame(5000, ihl, doff)
    ((offload, sent),) = way.send(packet(data, large(1000, start)))
    end = start + doff * 4
    assert offload == Offload(True, False, start, 16, Gso.TCPV4, 1000, end)
    assert int.from_bytes(sent[16:18], "big") == len(data) - 14
    assert internet_checksum(sent[14:start]) == 0
    pseudo = sent[26:34] + struct.pack(">HH", 6, len(data) - start)
    assert int.from_bytes(sent[start + 16 : start + 18], "big") == 0xFFFF - internet_checksum(
        pseudo
    )
    for low, high in ((0, 16), (18, 24), (26, start + 16), (start + 18, len(data))):
        assert sent[low:high] == data[low:high]


def test_a_large_send_that_is_small(way: Way) -> None:
    ((offload, sent),) = way.send(packet(ip4_frame(1000), large()))
    assert offload == Offload(True, False, 34, 16)
    assert len(sent) == len(ip4_frame(1000))


def test_a_segment_size_that_no_header_can_say(way: Way) -> None:
    """No frame is that long."""
    frame = ip4_frame(65535 - 40)
    assert len(frame) == 65535 + 14
    ((offload, _),) = way.send(packet(frame, large(0x10000)))
    assert offload == Offload(True, False, 34, 16)


@pytest.mark.parametrize(
    ("data", "wanted", "field", "value", "offset"),
    [
        (ip4_frame(5000), large(version2=False), "type", 0, 0),
        (ip4_frame(5000), large(ip6=True), "ethertype", 0x0800, 12),
        (ip4_frame(5000), large(start=38), "tcp_header_offset", 38, 0),
        (ip4_frame(5000), large(47), "mss", 47, 0),
        (ip4_frame(5000), large(0), "mss", 0, 0),
        (ip4_frame(65535 - 36), large(), "length", 65539, 0),
        (ip4_frame(5000, doff=4), large(), "data_offset", 0x40, 46),
        (ip4_frame(0, doff=5)[:-1], large(), "length", 53, 0),
        (ip4_frame(0, doff=15)[:60], large(), "data_offset", 0xF0, 46),
        (ETHERNET + b"\x08\0\x44" + bytes(60), large(), "version_ihl", 0x44, 14),
        (ETHERNET + b"\x08\0\x4f" + bytes(40), large(), "version_ihl", 0x4F, 14),
        (ETHERNET + b"\x08\0\x45" + bytes(10), large(), "length", 25, 0),
        (ETHERNET + b"\x08\0\x45" + bytes(60), large(), "protocol", 0, 23),
        (ETHERNET + b"\x81\0", large(), "ethertype", 0, 12),
        (ETHERNET + b"\x86\xdd" + bytes(60), large(ip6=True), "tcp_header_offset", 34, 0),
        (ETHERNET + b"\x86\xdd" + bytes(40), large(start=60, ip6=True), "tcp_header_offset", 60, 0),
        (ETHERNET + b"\x86\xdd" + bytes(40), large(start=54, ip6=True), "length", 0, 0),
    ],
)
def test_a_large_send_that_cannot_be(
    way: Way, data: bytes, wanted: bytes, field: str, value: int, offset: int
) -> None:
    assert wrong(way, packet(data, wanted)) == (FrameError, field, value, offset)


@ANY
@given(
    st.binary(max_size=120),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 500, 9000, 65000]),
    st.booleans(),
    st.sampled_from([CHECKSUM, LARGE_SEND]),
)
def test_any_frame(way: Way, body: bytes, value: int, more: int, ip6: bool, kind: int) -> None:
    """What is accepted has its headers inside of the frame."""
    data = ETHERNET + (b"\x86\xdd" if ip6 else b"\x08\0") + body + bytes(more)
    with contextlib.suppress(NetError):
        way.send(packet(data, element(kind, value)))
    for offload, frame in way.frames:
        assert len(frame) == len(data)
        assert not offload.needs_checksum or offload.start + offload.offset + 2 <= len(frame)
        assert offload.gso == Gso.NONE or (
            offload.segment_size >= 48 and offload.start + 20 <= offload.header_length <= len(frame)
        )
