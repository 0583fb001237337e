# SPDX-License-Identifier: GPL-2.0-or-later
"""NVSP messages and the card's answers to them: bytes in, bytes out, in every version."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.net_codec import adapter
from vhostvmbus.devices.net import nvsp, protocol
from vhostvmbus.devices.net.errors import NvspError
from vhostvmbus.devices.net.nvsp import Capability, MessageType, Status, Version
from vhostvmbus.devices.net.protocol import Answer, Lend, OfferSubchannels, Revoke

VERSIONS = list(Version)


def message(kind: int, body: bytes = b"") -> bytes:
    return (struct.pack("<I", kind) + body).ljust(40, b"\0")


def negotiated(version: Version = Version.V6_1, subchannels: int = 0) -> protocol.Protocol:
    card = protocol.Protocol(adapter(), max_subchannels=subchannels)
    action = card.receive(message(1, struct.pack("<II", version, version)))
    assert isinstance(action, Answer)
    assert struct.unpack_from("<IIII", action.payload) == (2, version, 34, 1)
    assert len(action.payload) == 40
    return card


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_is_taken(version: Version) -> None:
    assert negotiated(version).version is version


@pytest.mark.parametrize(
    ("low", "high", "status", "chosen"),
    [
        (2, 0x60001, 1, 0x60001),
        (2, 0x70000, 1, 0x60001),
        (0x30002, 0x40001, 1, 0x40000),
        (0x70000, 0x70000, 3, 0),
        (0, 1, 4, 0),
        (0x50001, 0x50002, 7, 0),
        (0x60001, 2, 7, 0),
    ],
)
def test_a_range_of_versions(low: int, high: int, status: int, chosen: int) -> None:
    card = protocol.Protocol(adapter())
    action = card.receive(message(1, struct.pack("<II", low, high)))
    assert isinstance(action, Answer)
    assert struct.unpack_from("<IIII", action.payload) == (2, chosen, 34, status)
    assert (card.version or 0) == chosen


@pytest.mark.parametrize(
    ("kind", "body", "since"),
    [
        (100, struct.pack("<II", 6, 30), Version.V1),
        (101, struct.pack("<IH", 0xE1E10, 0xCAFE), Version.V1),
        (104, struct.pack("<IH", 0xE1E11, 0), Version.V1),
        (125, struct.pack("<IIQ", 1514, 0, 8), Version.V2),
        (129, struct.pack("<I", 0), Version.V4),
        (133, struct.pack("<II", 1, 3), Version.V5),
        (135, struct.pack("<I", 1), Version.V6),
    ],
)
def test_a_message_exists_from_its_version_on(kind: int, body: bytes, since: Version) -> None:
    with pytest.raises(NvspError):
        nvsp.decode(message(kind, body), 0)
    for version in VERSIONS:
        if version < since:
            with pytest.raises(NvspError, match="not in version"):
                nvsp.decode(message(kind, body), version)
        else:
            nvsp.decode(message(kind, body), version)


@pytest.mark.parametrize("kind", [100, 101, 103, 104, 106, 108, 125, 129, 133, 135])
def test_a_message_that_is_cut_short(kind: int) -> None:
    whole = message(kind, bytes(range(1, 30)))
    needed = next(length for length in range(41) if decodes(whole[:length]))
    assert 6 <= needed <= 20
    for length in range(needed):
        with pytest.raises(NvspError, match="length") as caught:
            nvsp.decode(whole[:length], Version.V6_1)
        assert caught.value.value == length


def decodes(payload: bytes) -> bool:
    try:
        nvsp.decode(payload, Version.V6_1)
    except NvspError:
        return False
    return True


def test_an_rndis_packet() -> None:
    """It is none of the protocol's: what is in it is."""
    whole = message(107, struct.pack("<III", 1, 3, 100))
    assert nvsp.decode_rndis_packet(whole) == (1, 3, 100)
    assert nvsp.decode_rndis_packet(whole[:16]) == (1, 3, 100)
    for length in range(4, 16):
        with pytest.raises(NvspError, match="length") as caught:
            nvsp.decode_rndis_packet(whole[:length])
        assert caught.value.value == length
    for card in (protocol.Protocol(adapter()), negotiated()):
        action = card.receive(whole)
        assert isinstance(action, Answer)
        assert struct.unpack_from("<II", action.payload) == (108, 2)
        assert action.error is not None
        assert (action.error.field, action.error.value) == ("msg_type", 107)


@pytest.mark.parametrize("kind", [0, 2, 3, 99, 102, 105, 109, 127, 130, 132, 134, 136, 0xFFFFFFFF])
def test_an_unknown_message(kind: int) -> None:
    card = negotiated()
    action = card.receive(message(kind))
    assert isinstance(action, Answer)
    assert action.error is not None
    assert (action.error.field, action.error.value) == ("msg_type", kind)


def test_buffers_are_lent_once_and_given_back() -> None:
    card = negotiated()
    for receive, kind, revoke in ((True, 101, 103), (False, 104, 106)):
        body = struct.pack("<IH", 0xE1E10, 7)
        assert card.receive(message(kind, body)) == Lend(receive, 0xE1E10, 7)
        if receive:
            card.receive_lent = True
        else:
            card.send_lent = True
        again = card.receive(message(kind, body))
        assert isinstance(again, Answer)
        assert again.payload[:8] == struct.pack("<II", kind + 1, Status.FAIL)
        assert again.error is not None
        assert card.receive(message(revoke, struct.pack("<H", 7))) == Revoke(receive)
        assert card.receive(message(kind, body)) == Lend(receive, 0xE1E10, 7)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_size_of_messages(version: Version) -> None:
    """Windows' driver takes no other; and no message needs more."""
    card = negotiated(version)
    size = 40 if version is Version.V6_1 else 28
    assert card.message_size == nvsp.message_size(version) == size
    table = nvsp.indirection_table(range(16), size)
    assert struct.unpack_from("<III", table) == (134, 16, size)
    assert struct.unpack_from("<16I", table, size) == tuple(range(16))
    assert len(table) == size + 64
    for whole in (
        nvsp.receive_buffer_complete(Status.SUCCESS, 1728, 606),
        nvsp.subchannels_complete(Status.SUCCESS, 3),
        nvsp.packet_direct_complete(1),
        nvsp.rndis_packet(nvsp.RndisChannel.DATA),
    ):
        assert not any(whole[28:])


def test_the_size_of_messages_before_a_version_is_known() -> None:
    card = protocol.Protocol(adapter())
    assert card.message_size == 40
    card.receive(message(1, struct.pack("<II", 0, 1)))
    assert card.message_size == 28


def test_completions_as_linux_reads_them() -> None:
    answer = nvsp.receive_buffer_complete(Status.SUCCESS, 1728, 606)
    assert struct.unpack_from("<7I", answer) == (102, 1, 1, 0, 1728, 606, 1728 * 606)
    assert struct.unpack_from("<III", nvsp.send_buffer_complete(Status.SUCCESS, 6144)) == (
        105, 1, 6144,
    )  # fmt: skip
    assert struct.unpack_from("<II", nvsp.rndis_packet_complete(Status.FAIL)) == (108, 2)
    packet = nvsp.rndis_packet(nvsp.RndisChannel.CONTROL)
    assert struct.unpack_from("<IIII", packet) == (107, 1, 0xFFFFFFFF, 0)
    table = nvsp.indirection_table([n % 4 for n in range(16)])
    assert struct.unpack_from("<III", table) == (134, 16, 40)
    assert struct.unpack_from("<16I", table, 40) == tuple(n % 4 for n in range(16))
    with pytest.raises(ValueError, match="16 entries"):
        nvsp.indirection_table([0])
    everything = (answer, packet, nvsp.init_complete(Status.FAIL, 0))
    assert {len(item) for item in everything} == {40}


def test_the_configuration() -> None:
    card = negotiated()
    action = card.receive(message(125, struct.pack("<IIQ", 9014, 0, 0x88)))
    assert action == Answer(b"")
    assert card.frame_size == 9014
    assert card.capabilities == Capability.RSC | Capability.IEEE8021Q
    assert card.coalescing
    assert card.tagging
    assert card.section_size == 13312
    for version, capabilities, mtu, size in (
        (Version.V6, 0x88, 1500, 1728),
        (Version.V6_1, 0x08, 1500, 1728),
        (Version.V6_1, 0x00, 9000, 9216),
        (Version.V2, 0x00, 1600, 1792),
        (Version.V6_1, 0x80, 65521, 65728),
    ):
        card = negotiated(version)
        card.receive(message(125, struct.pack("<IIQ", mtu + 14, 0, capabilities)))
        assert card.section_size == size


@pytest.mark.parametrize("frame_size", [0, 81, 65536, 0xFFFFFFFF])
def test_a_frame_size_that_cannot_be_stands_for_the_ordinary_one(frame_size: int) -> None:
    """A driver derived from FreeBSD's says 0; it can what it says it can."""
    card = negotiated()
    card.receive(message(125, struct.pack("<IIQ", 9014, 0, 0)))
    assert card.receive(message(125, struct.pack("<IIQ", frame_size, 0, 0x88))) == Answer(b"")
    assert (card.frame_size, card.adapter.guest_mtu) == (1514, 1500)
    assert card.tagging
    assert card.coalescing


def test_the_configuration_comes_before_the_buffers() -> None:
    card = negotiated()
    card.receive_lent = True
    for kind, body in ((125, struct.pack("<IIQ", 1514, 0, 0)), (1, struct.pack("<II", 2, 2))):
        action = card.receive(message(kind, body))
        assert isinstance(action, Answer)
        assert action.error is not None
    assert card.version is Version.V6_1


def test_subchannels() -> None:
    card = negotiated(subchannels=3)
    assert card.receive(message(133, struct.pack("<II", 1, 7))) == OfferSubchannels(3)
    assert struct.unpack_from("<III", protocol.subchannels_answer(3)) == (133, 1, 3)
    for operation, count in ((0, 1), (2, 1), (1, 0)):
        refused = card.receive(message(133, struct.pack("<II", operation, count)))
        assert isinstance(refused, Answer)
        assert refused.error is not None
        assert struct.unpack_from("<III", refused.payload) == (133, 2, 0)
    none = negotiated().receive(message(133, struct.pack("<II", 1, 1)))
    assert isinstance(none, Answer)
    assert struct.unpack_from("<III", none.payload) == (133, 2, 0)


def test_what_is_not_there() -> None:
    card = negotiated()
    assert card.receive(message(129, struct.pack("<I", 0))) == Answer(b"")
    switch = card.receive(message(129, struct.pack("<I", 1)))
    assert isinstance(switch, Answer)
    assert switch.error is not None
    direct = card.receive(message(135, struct.pack("<I", 1)))
    assert isinstance(direct, Answer)
    assert struct.unpack_from("<III", direct.payload) == (135, 1, 0xC00000BB)
    beside = card.receive(message(131))
    assert isinstance(beside, Answer)
    assert beside.error is None
    assert struct.unpack_from("<III", beside.payload) == (132, 0xC00000BB, 0)
    refused = card.receive(message(108))
    assert isinstance(refused, Answer)
    assert refused.error is not None


def test_a_subchannel_has_only_data() -> None:
    card = negotiated()
    for kind in (1, 100, 101, 133):
        action = card.receive(message(kind, struct.pack("<II", 1, 1)), primary=False)
        assert isinstance(action, Answer)
        assert action.error is not None


@given(st.binary(max_size=64), st.sampled_from([0, *VERSIONS]))
def test_any_bytes(payload: bytes, version: int) -> None:
    card = protocol.Protocol(adapter(), max_subchannels=2)
    card.version = Version(version) if version else None
    action = card.receive(payload)
    if isinstance(action, Answer):
        assert action.error is not None or len(payload) >= 4
        assert len(action.payload) in (0, 40)


@given(st.sampled_from(list(MessageType)), st.binary(max_size=60))
def test_any_body(kind: MessageType, body: bytes) -> None:
    negotiated(subchannels=2).receive(struct.pack("<I", kind) + body)
