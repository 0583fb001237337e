# SPDX-License-Identifier: GPL-2.0-or-later
"""RNDIS requests: bytes in, bytes out."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.net_codec import adapter
from vhostvmbus.devices.net import protocol, rndis, status
from vhostvmbus.devices.net.errors import RndisError
from vhostvmbus.devices.net.oids import Change


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
    short = request(5, 9, 0x10101, 2, 16, data=b"de")  # without the reserved word
    assert rndis.decode_control(short) == rndis.Set(9, 0x10101, b"de")
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
        (request(4, 1, 2, 0), "msg_len"),
        (request(2, 1, 1, 0), "msg_len"),
        (request(3), "msg_len"),
        (request(8), "msg_len"),
        (request(4, 1, 2, 1, 15, 0, data=b"x"), "info_buf_offset"),
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
