# SPDX-License-Identifier: GPL-2.0-or-later
"""RNDIS messages, per-packet information, and the frames' headers: bytes in, bytes out."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.net_codec import adapter
from vhostvmbus.devices.net import frame, ppi, protocol, rndis, status
from vhostvmbus.devices.net.errors import FrameError, NetError, PacketInfoError, RndisError
from vhostvmbus.devices.net.link import Gso, Offload
from vhostvmbus.devices.net.oids import Change

# -- control messages ------------------------------------------------------------------------------


def request(kind: int, *words: int, data: bytes = b"", length: int | None = None) -> bytes:
    body = struct.pack(f"<{len(words)}I", *words) + data
    return struct.pack("<II", kind, 8 + len(body) if length is None else length) + body


def test_every_request_is_decoded() -> None:
    assert rndis.decode_control(request(2, 9, 1, 0, 0x4000)) == rndis.Initialize(9, 1, 0, 0x4000)
    assert rndis.decode_control(request(3, 9)) == rndis.Halt(9)
    query = request(4, 9, 0x10101, 4, 20, 0, data=b"abcd")
    assert rndis.decode_control(query) == rndis.Query(9, 0x10101, b"abcd")
    empty = request(5, 9, 0x10101, 0, 0xFFFFFFFF, 0)
    assert rndis.decode_control(empty) == rndis.Set(9, 0x10101, b"")
    late = request(5, 9, 0x10101, 2, 23, 0, data=b"abcde" + b"!")
    assert rndis.decode_control(late) == rndis.Set(9, 0x10101, b"de")
    assert rndis.decode_control(request(6, 0)) == rndis.Reset()
    assert rndis.decode_control(request(8, 9) + b"more") == rndis.Keepalive(9)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "length"),
        (bytes(7), "length"),
        (request(4, 1, 2, 0, 0, 0, length=7), "msg_len"),
        (request(4, 1, 2, 0, 0, 0, length=29), "msg_len"),
        (request(4, 1, 2, 0, 0), "msg_len"),
        (request(2, 1, 1, 0), "msg_len"),
        (request(3), "msg_len"),
        (request(8), "msg_len"),
        (request(4, 1, 2, 1, 19, 0, data=b"x"), "info_buf_offset"),
        (request(4, 1, 2, 1, 22, 0, data=b"x"), "info_buf_offset"),
        (request(4, 1, 2, 2, 20, 0, data=b"x"), "info_buflen"),
        (request(5, 1, 2, 0xFFFFFFFF, 20, 0, data=b"x"), "info_buflen"),
        (request(5, 1, 2, 1, 0xFFFFFFF8, 0, data=b"x"), "info_buf_offset"),
        (request(1, 1), "ndis_msg_type"),
        (request(7, 1), "ndis_msg_type"),
        (request(0x80000002, 1), "ndis_msg_type"),
    ],
)
def test_a_request_that_lies(data: bytes, field: str) -> None:
    with pytest.raises(RndisError) as caught:
        rndis.decode_control(data)
    assert caught.value.field == field


def initialized() -> protocol.Protocol:
    card = protocol.Protocol(adapter())
    outcome = card.control(request(2, 1, 1, 0, 0x4000), 0x21000)
    (answer,) = outcome.messages
    assert struct.unpack("<13I", answer) == (
        0x80000002, 52, 1, 0, 1, 0, 1, 0, 64, 0x21000, 3, 0, 0,
    )  # fmt: skip
    assert outcome.reset
    return card


def test_the_answers() -> None:
    card = initialized()
    (answer,) = card.control(request(8, 5), 0).messages
    assert struct.unpack("<IIII", answer) == (0x80000008, 16, 5, 0)
    (answer,) = card.control(request(4, 6, 0x10106, 0, 0, 0), 0).messages
    assert struct.unpack("<7I", answer) == (0x80000004, 28, 6, 0, 4, 16, 1500)
    (answer,) = card.control(request(4, 6, 0x7777, 0, 0, 0), 0).messages
    assert struct.unpack("<6I", answer) == (0x80000004, 24, 6, status.NOT_SUPPORTED, 0, 16)
    outcome = card.control(request(5, 7, 0x1010E, 4, 20, 0, data=b"\x0b\0\0\0"), 0)
    assert outcome.change is Change.FILTER
    assert struct.unpack("<IIII", outcome.messages[0]) == (0x80000005, 16, 7, 0)
    assert card.adapter.packet_filter == 0x0B
    outcome = card.control(request(6, 0), 0)
    assert struct.unpack("<IIII", outcome.messages[0]) == (0x80000006, 16, 0, 1)
    assert outcome.reset
    assert card.adapter.packet_filter == 0
    outcome = card.control(request(3, 8), 0)
    assert outcome.messages == []
    assert card.rndis is protocol.Rndis.UNINITIALIZED


def test_nothing_before_the_initialization() -> None:
    card = protocol.Protocol(adapter())
    for kind, words in ((4, (6, 0x10106, 0, 0, 0)), (5, (6, 0x1010E, 0, 0, 0)), (8, (6,))):
        outcome = card.control(request(kind, *words), 0)
        assert outcome.error is not None
        assert struct.unpack_from("<II", outcome.messages[0], 8) == (6, status.ADAPTER_NOT_READY)
    outcome = card.control(request(6, 0), 0)
    assert struct.unpack_from("<II", outcome.messages[0], 8) == (status.ADAPTER_NOT_READY, 0)
    outcome = card.control(request(2, 1, 2, 0, 0), 0)
    assert struct.unpack_from("<II", outcome.messages[0], 8) == (1, status.BAD_VERSION)
    assert card.rndis is protocol.Rndis.UNINITIALIZED


def test_the_link_goes_down_and_up() -> None:
    card = initialized()
    assert card.link_changed(True) == []
    (down,) = card.link_changed(False)
    assert struct.unpack("<5I", down) == (7, 20, status.MEDIA_DISCONNECT, 0, 0)
    assert card.link_changed(False) == []
    (up,) = card.link_changed(True)
    assert struct.unpack("<5I", up) == (7, 20, status.MEDIA_CONNECT, 0, 0)
    fresh = protocol.Protocol(adapter())
    assert fresh.link_changed(False) == []
    assert not fresh.adapter.connected
    told = rndis.indicate_status(status.LINK_SPEED_CHANGE, b"1234")
    assert struct.unpack("<II III", told[:20]) == (7, 24, status.LINK_SPEED_CHANGE, 4, 12)


@given(st.binary(max_size=80))
def test_any_control_bytes(data: bytes) -> None:
    for card in (protocol.Protocol(adapter()), initialized()):
        outcome = card.control(data, 0)
        assert outcome.messages or outcome.error or card.rndis is protocol.Rndis.UNINITIALIZED


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.lists(st.integers(0, 2**32 - 1), max_size=12))
def test_any_control_fields(kind: int, words: list[int]) -> None:
    initialized().control(request(kind, *words), 0)


# -- packet messages -------------------------------------------------------------------------------


def packet(
    size: int = 60,
    info: bytes = b"",
    *,
    length: int | None = None,
    data_offset: int | None = None,
    data_length: int | None = None,
    oob: tuple[int, int] = (0, 0),
    info_offset: int = 36,
    info_length: int | None = None,
) -> bytes:
    head = 44 + len(info)
    fields = (
        1, head + size if length is None else length,
        head - 8 if data_offset is None else data_offset,
        size if data_length is None else data_length, *oob, 0, info_offset,
        len(info) if info_length is None else info_length, 0, 0,
    )  # fmt: skip
    return struct.pack("<11I", *fields) + info + bytes(size)


def test_a_packet_message() -> None:
    info = ppi.element(ppi.VLAN, 5)
    data = packet(60, info)
    assert rndis.packet_layout(data, len(data)) == (120, 60, 60, 44, 16)
    assert rndis.packet_layout(data[:44], 500) == (120, 60, 60, 44, 16)
    built = rndis.packet_header(112, 60, info)
    assert rndis.packet_layout(built, 172) == (172, 112, 60, 44, 16)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (packet()[:7], "length"),
        (packet(length=105), "msg_len"),
        (packet(length=7), "msg_len"),
        (packet(length=43), "msg_len"),
        (packet(length=0xFFFFFFFF), "msg_len"),
        (packet(data_offset=35), "data_offset"),
        (packet(data_offset=97), "data_offset"),
        (packet(data_offset=0xFFFFFFFC), "data_offset"),
        (packet(data_length=61), "data_len"),
        (packet(data_length=0xFFFFFFFF), "data_len"),
        (packet(oob=(0, 4)), "oob_data_len"),
        (packet(oob=(40, 0xFFFFFFFF)), "oob_data_len"),
        (packet(info_length=4, info_offset=35), "per_pkt_info_offset"),
        (packet(info_length=4, info_offset=97), "per_pkt_info_offset"),
        (packet(info_length=61, info_offset=36), "per_pkt_info_len"),
        (packet(3000, info_length=1025), "per_pkt_info_len"),
        (struct.pack("<II", 2, 44) + bytes(36), "ndis_msg_type"),
    ],
)
def test_a_packet_message_that_lies(data: bytes, field: str) -> None:
    with pytest.raises(RndisError) as caught:
        rndis.packet_layout(data, len(data))
    assert caught.value.field == field


@given(st.lists(st.integers(0, 200) | st.integers(0, 2**32 - 1), min_size=11, max_size=11))
def test_any_packet_fields(fields: list[int]) -> None:
    """What is accepted lies inside of the message, which lies inside of what is there."""
    fields[0] = 1
    try:
        found = rndis.packet_layout(struct.pack("<11I", *fields), 180)
    except RndisError:
        return
    assert 44 <= found.length <= 180
    assert 44 <= found.data_offset <= found.data_offset + found.data_length <= found.length
    if found.info_length:
        assert 44 <= found.info_offset <= found.info_offset + found.info_length <= found.length


# -- per-packet information ------------------------------------------------------------------------


def test_a_chain() -> None:
    chain = (
        ppi.element(ppi.CHECKSUM, 5)
        + struct.pack("<III", 12, 3, 12)
        + struct.pack("<IIIIII", 24, ppi.VLAN, 20, 0, 0, 7)
        + ppi.element(ppi.INTERNAL | ppi.CHECKSUM, 99)
        + ppi.element(ppi.HASH_VALUE, 0xFFFFFFFF)
    )
    assert ppi.parse(chain) == ppi.PacketInfo(checksum=5, vlan=7, hash=0xFFFFFFFF)
    assert ppi.parse(b"") == ppi.PacketInfo()


@pytest.mark.parametrize(
    ("chain", "field"),
    [
        (bytes(11), "size"),
        (struct.pack("<III", 0, 0, 12), "size"),
        (struct.pack("<III", 11, 0, 12), "size"),
        (struct.pack("<IIII", 17, 0, 12, 0), "size"),
        (struct.pack("<IIII", 0xFFFFFFFF, 0, 12, 0), "size"),
        (struct.pack("<IIII", 16, 0, 11, 0), "ppi_offset"),
        (struct.pack("<IIII", 16, 0, 17, 0), "ppi_offset"),
        (struct.pack("<IIII", 16, 0, 13, 0), "size"),
        (struct.pack("<III", 12, 2, 12), "size"),
        (ppi.element(0, 1) + ppi.element(0, 1), "type"),
        (ppi.element(0, 1) + b"\0", "size"),
        (ppi.element(3, 0) * 65, "per_pkt_info_len"),
    ],
)
def test_a_chain_that_lies(chain: bytes, field: str) -> None:
    with pytest.raises(PacketInfoError) as caught:
        ppi.parse(chain)
    assert caught.value.field == field


@given(st.binary(max_size=200))
def test_any_chain(data: bytes) -> None:
    try:
        ppi.parse(data)
    except PacketInfoError:
        return


@given(st.integers(0, 0xFFFF))
def test_tags_there_and_back(tag: int) -> None:
    assert ppi.vlan_tag(ppi.vlan_value(tag)) == tag
    assert ppi.vlan_value(tag) == (tag >> 13) | ((tag >> 12) & 1) << 3 | (tag & 0xFFF) << 4


def test_what_the_four_bytes_say() -> None:
    assert ppi.send_checksum(0x00360005) == (True, False, True, False, False, 0x36)
    assert ppi.send_checksum(0x0036000A) == (False, True, False, True, False, 0x36)
    assert ppi.large_send(0x40000000 | 0x22 << 20 | 1448) == (1448, 0x22, True, False)
    assert ppi.large_send(0xC0000000 | 0x36 << 20 | 1428) == (1428, 0x36, True, True)
    parts = [ppi.fragment(n, 3, 0x12345) for n in range(3)]
    assert [struct.unpack("<IIII", part)[3] for part in parts] == [
        0x23450301, 0x23450101, 0x23450501,
    ]  # fmt: skip


# -- frames' headers -------------------------------------------------------------------------------

ETHERNET = bytes(12)
TCP4 = ppi.SendChecksum(True, False, True, False, False, 34)


def ip4_frame(payload: int = 100, ihl: int = 5, doff: int = 5) -> bytes:
    ip = struct.pack(">BBHHHBBH8s", 0x40 | ihl, 0, 0, 0, 0, 64, 6, 0xDEAD, bytes(range(1, 9)))
    tcp = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, doff << 4, 0, 0, 0xBEEF, 0)
    options = bytes(ihl * 4 - 20), bytes(max(0, doff * 4 - 20))
    return ETHERNET + b"\x08\0" + ip + options[0] + tcp + options[1] + bytes(payload)


@given(st.binary(max_size=300))
def test_the_sum_is_the_internets(data: bytes) -> None:
    total = 0
    for at in range(0, len(data), 2):
        total += data[at] << 8 | (data[at + 1] if at + 1 < len(data) else 0)
        total = (total & 0xFFFF) + (total >> 16)
    assert frame.ones_complement_sum(data) % 0xFFFF == total % 0xFFFF


def test_a_checksum_to_be_done() -> None:
    data = ip4_frame()
    head, offload = frame.checksum_offload(data, len(data), TCP4)
    assert head == data
    assert offload == Offload(needs_checksum=True, start=34, offset=16)
    udp = TCP4._replace(tcp=False, udp=True, transport_offset=0)
    assert frame.checksum_offload(data, len(data), udp)[1] == Offload(
        needs_checksum=True, start=34, offset=6
    )
    ip = TCP4._replace(tcp=False, ip_header=True)
    head, offload = frame.checksum_offload(data, len(data), ip)
    assert offload == Offload()
    assert frame.ones_complement_sum(head[14:34]) == 0xFFFF
    assert head[:24] + head[26:] == data[:24] + data[26:]


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (TCP4._replace(ipv6=True), "ethertype"),
        (TCP4._replace(ipv4=False), "ethertype"),
        (TCP4._replace(ipv4=False, ipv6=True), "ethertype"),
        (TCP4._replace(udp=True), "transmit"),
        (TCP4._replace(transport_offset=33), "tcp_header_offset"),
        (TCP4._replace(transport_offset=135), "tcp_header_offset"),
        (TCP4._replace(transport_offset=1023), "tcp_header_offset"),
    ],
)
def test_a_checksum_that_cannot_be_done(wanted: ppi.SendChecksum, field: str) -> None:
    data = ip4_frame()
    with pytest.raises(FrameError) as caught:
        frame.checksum_offload(data, len(data), wanted)
    assert caught.value.field == field


LARGE4 = ppi.LargeSend(1000, 34, True, False)


@pytest.mark.parametrize(("ihl", "doff"), [(5, 5), (5, 8), (15, 15), (6, 5)])
def test_a_large_send(ihl: int, doff: int) -> None:
    start = 14 + ihl * 4
    data = ip4_frame(5000, ihl, doff)
    head = data[: start + 60]
    sent, offload = frame.segmentation_offload(
        head, len(data), LARGE4._replace(transport_offset=start)
    )
    end = start + doff * 4
    assert offload == Offload(True, False, start, 16, Gso.TCPV4, 1000, end)
    assert len(sent) == len(head)
    assert int.from_bytes(sent[16:18], "big") == len(data) - 14
    assert frame.ones_complement_sum(sent[14:start]) == 0xFFFF
    pseudo = sent[26:34] + struct.pack(">HH", 6, len(data) - start)
    seed = int.from_bytes(sent[start + 16 : start + 18], "big")
    assert seed % 0xFFFF == frame.ones_complement_sum(pseudo) % 0xFFFF


def test_a_large_send_that_is_small() -> None:
    data = ip4_frame(1000)
    _, offload = frame.segmentation_offload(data[:94], len(data), LARGE4)
    assert offload == Offload(needs_checksum=True, start=34, offset=16)


@pytest.mark.parametrize(
    ("data", "wanted", "field"),
    [
        (ip4_frame(5000), LARGE4._replace(version2=False), "type"),
        (ip4_frame(5000), LARGE4._replace(ipv6=True), "ethertype"),
        (ip4_frame(5000), LARGE4._replace(transport_offset=38), "tcp_header_offset"),
        (ip4_frame(5000), LARGE4._replace(segment_size=47), "mss"),
        (ip4_frame(5000), LARGE4._replace(segment_size=0), "mss"),
        (ip4_frame(66000), LARGE4, "length"),
        (ip4_frame(5000, doff=4), LARGE4, "data_offset"),
        (ip4_frame(0, doff=5)[:-1], LARGE4, "length"),
        (ip4_frame(0, doff=15)[:60], LARGE4, "data_offset"),
        (ETHERNET + b"\x08\0\x44" + bytes(60), LARGE4, "version_ihl"),
        (ETHERNET + b"\x08\0\x4f" + bytes(40), LARGE4, "version_ihl"),
        (ETHERNET + b"\x08\0\x45" + bytes(10), LARGE4, "length"),
        (ETHERNET + b"\x08\0\x45" + bytes(60), LARGE4, "protocol"),
        (bytes(13), LARGE4, "ethertype"),
        (ETHERNET + b"\x81\0", LARGE4, "ethertype"),
        (ETHERNET + b"\x86\xdd" + bytes(60), LARGE4._replace(ipv6=True), "tcp_header_offset"),
        (
            ETHERNET + b"\x86\xdd" + bytes(40),
            LARGE4._replace(ipv6=True, transport_offset=60),
            "tcp_header_offset",
        ),
    ],
)
def test_a_large_send_that_cannot_be(data: bytes, wanted: ppi.LargeSend, field: str) -> None:
    with pytest.raises(FrameError) as caught:
        frame.segmentation_offload(data[:94], len(data), wanted)
    assert caught.value.field == field


@given(st.binary(max_size=120), st.integers(0, 2**32 - 1), st.integers(0, 70000), st.booleans())
def test_any_frame(body: bytes, value: int, more: int, ip6: bool) -> None:
    """What is accepted has its headers inside of the frame."""
    data = ETHERNET + (b"\x86\xdd" if ip6 else b"\x08\0") + body
    length = len(data) + more
    try:
        head, offload = frame.segmentation_offload(data, length, ppi.large_send(value))
        assert offload.header_length <= length
        assert offload.start + 20 <= len(head) == len(data)
        assert offload.gso == Gso.NONE or offload.segment_size >= 48
    except NetError:
        pass
    try:
        head, offload = frame.checksum_offload(data, length, ppi.send_checksum(value))
        assert not offload.needs_checksum or offload.start + offload.offset + 2 <= length
        assert len(head) == len(data)
    except NetError:
        pass
    frame.transport(data)


def test_a_received_checksum_is_completed() -> None:
    data = bytearray(ip4_frame(101))
    pseudo = bytes(data[26:34]) + struct.pack(">HH", 6, len(data) - 34)
    data[50:52] = frame.ones_complement_sum(pseudo).to_bytes(2, "big")
    done = frame.completed_checksum(bytes(data), Offload(True, False, 34, 16))
    assert done is not None
    at, value = done
    data[at : at + 2] = value
    assert at == 50
    assert frame.ones_complement_sum(pseudo + data[34:]) == 0xFFFF
    for start, offset in ((0, 16), (len(data), 0), (34, len(data) - 35), (60000, 0)):
        assert frame.completed_checksum(bytes(data), Offload(True, False, start, offset)) is None
    assert (
        frame.completed_checksum(bytes(14) + b"\xff\xff", Offload(True, False, 14, 0)) is not None
    )
    zero = frame.completed_checksum(bytes(34) + b"\xff\xff" + bytes(6), Offload(True, False, 34, 6))
    assert zero == (40, b"\xff\xff")
