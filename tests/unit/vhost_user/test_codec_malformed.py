# SPDX-License-Identifier: GPL-2.0-or-later
"""The codec: every malformed variant of every message has its named error."""

from __future__ import annotations

import struct

import pytest

from tests.support.vhost_user_messages import (
    OFFER_BYTES,
    REGION,
    REQUESTS,
    decode,
    header,
)
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import REPLY, Decoder, Direction, encode
from vhostvmbus.vhost_user.errors import (
    BadField,
    BadFlags,
    BadVersion,
    LimitExceeded,
    Oversized,
    ProtocolError,
    UnknownRequest,
    WrongFds,
    WrongSize,
)


def bad(number: int, payload: bytes, flags: int = 1) -> bytes:
    return header(number, flags, len(payload)) + payload


def replaced(message: m.Message, offset: int, value: bytes) -> bytes:
    payload = bytearray(message.pack())
    payload[offset : offset + len(value)] = value
    return bad(message.REQUEST, bytes(payload))


REGION_AT_END = m.AddMemReg(m.MemoryRegion((1 << 64) - 0x1000, 0x1000, 0, 0))

MALFORMED: list[tuple[str, bytes, int, type[ProtocolError], str]] = [
    ("version 0", header(1, 0, 0), 0, BadVersion, "version"),
    ("version 2", header(1, 2, 0), 0, BadVersion, "version"),
    ("version 3", header(1, 3, 0), 0, BadVersion, "version"),
    ("undefined flag", header(1, 1 | 16, 0), 0, BadFlags, "flags"),
    ("highest flag", header(1, 1 | 1 << 31, 0), 0, BadFlags, "flags"),
    ("a reply among requests", header(1, 1 | REPLY, 0), 0, BadFlags, "flags"),
    ("request 0", header(0, 1, 0), 0, UnknownRequest, "request"),
    ("SET_VRING_NUM", header(8, 1, 8), 0, UnknownRequest, "request"),
    ("request 1035", header(1035, 1, 0), 0, UnknownRequest, "request"),
    ("request 2**32-1", header(0xFFFFFFFF, 1, 0), 0, UnknownRequest, "request"),
    ("payload of 4097", header(5, 1, 4097), 0, Oversized, "size"),
    ("payload of 4 GiB", header(1, 1, 0xFFFFFFFF), 0, Oversized, "size"),
    ("GetFeatures with payload", header(1, 1, 8), 0, WrongSize, "size"),
    ("SetFeatures of 4 bytes", header(2, 1, 4), 0, WrongSize, "size"),
    ("SetFeatures of 0 bytes", header(2, 1, 0), 0, WrongSize, "size"),
    ("AddMemReg without padding", header(37, 1, 32), 1, WrongSize, "size"),
    ("Open one byte short", header(1027, 1, 143), 2, WrongSize, "size"),
    ("Open one byte long", header(1027, 1, 145), 2, WrongSize, "size"),
    ("memory table of 4 bytes", header(5, 1, 4), 0, WrongSize, "size"),
    ("memory table with half a region", header(5, 1, 24), 0, WrongSize, "size"),
    ("memory table of 9", header(5, 1, 8 + 32 * 9), 8, LimitExceeded, "size"),
    ("code map with half a region", header(1031, 1, 28), 1, WrongSize, "size"),
    ("code map without its head", header(1031, 1, 8), 1, WrongSize, "size"),
    ("code map of 101 regions", header(1031, 1, 16 + 24 * 101), 1, LimitExceeded, "size"),
    ("GetFeatures with an fd", header(1, 1, 0), 1, WrongFds, "fds"),
    ("AddMemReg without fd", bad(37, bytes(40)), 0, WrongFds, "fds"),
    ("AddMemReg with two", bad(37, bytes(40)), 2, WrongFds, "fds"),
    ("RemMemReg with two", bad(38, bytes(40)), 2, WrongFds, "fds"),
    ("Open with one fd", bad(1027, bytes(144)), 1, WrongFds, "fds"),
    ("Open with three", bad(1027, bytes(144)), 3, WrongFds, "fds"),
    ("back-end socket missing", header(21, 1, 0), 0, WrongFds, "fds"),
    ("GPADL without memfd", bad(1025, bytes(16)), 0, WrongFds, "fds"),
    ("code map without memfd", bad(1031, bytes(16)), 0, WrongFds, "fds"),
    ("Close with an fd", bad(1028, bytes(8)), 1, WrongFds, "fds"),
    ("a table of 2 with 1 fd", encode(m.SetMemTable((REGION, REGION))), 1, WrongFds, "fds"),
    ("a table of 1 with 2 fds", encode(m.SetMemTable((REGION,))), 2, WrongFds, "fds"),
    (
        "table count too big",
        replaced(m.SetMemTable((REGION,)), 0, b"\2"),
        1,
        BadField,
        "num_regions",
    ),
    (
        "table count huge",
        replaced(m.SetMemTable((REGION,)), 0, b"\xff" * 4),
        1,
        BadField,
        "num_regions",
    ),
    ("empty region", replaced(m.AddMemReg(REGION), 16, bytes(8)), 1, BadField, "size"),
    ("region past 2**64", replaced(REGION_AT_END, 16, b"\1\x10"), 1, BadField, "guest_phys_addr"),
    (
        "mmap offset past any file",
        replaced(m.AddMemReg(REGION), 32, b"\xff" * 8),
        1,
        BadField,
        "mmap_offset",
    ),
    ("GPADL of no range", encode(m.GpadlCreate(0, 1, 0, 16)), 1, BadField, "range_count"),
    ("GPADL of no byte", encode(m.GpadlCreate(0, 1, 1, 0)), 1, BadField, "range_bytes"),
    ("GPADL of 17 bytes", encode(m.GpadlCreate(0, 1, 1, 17)), 1, BadField, "range_bytes"),
    ("GPADL too short", encode(m.GpadlCreate(0, 1, 3, 40)), 1, BadField, "range_bytes"),
    (
        "GPADL with 2**32-1 ranges",
        encode(m.GpadlCreate(0, 1, 0xFFFFFFFF, 4096)),
        1,
        BadField,
        "range_bytes",
    ),
    ("open flags", replaced(REQUESTS[15][0], 20, b"\2"), 2, BadField, "flags"),
    (
        "in-flight reserved",
        replaced(m.SetInflightFd(1, 0, 1, 1), 20, b"\1"),
        1,
        BadField,
        "reserved",
    ),
    (
        "in-flight beyond any file",
        encode(m.SetInflightFd(1 << 62, 1 << 63, 1, 1)),
        1,
        BadField,
        "mmap_offset",
    ),
    ("Close with reserved", replaced(m.Close(0), 4, b"\1"), 0, BadField, "reserved"),
    ("code map reserved", replaced(m.SetCodeMap(0, ()), 12, b"\1"), 1, BadField, "reserved"),
    ("code map count", replaced(m.SetCodeMap(0, ()), 8, b"\1"), 1, BadField, "region_count"),
    (
        "empty code map region",
        encode(m.SetCodeMap(8, (m.CodeMapRegion(0, 0, 0),))),
        1,
        BadField,
        "size",
    ),
    (
        "code map region past 2**64",
        encode(m.SetCodeMap(8, (m.CodeMapRegion((1 << 64) - 1, 2, 0),))),
        1,
        BadField,
        "size",
    ),
    (
        "one bit beyond the map",
        encode(m.SetCodeMap(1, (m.CodeMapRegion(0, 8 * 4096 + 1, 0),))),
        1,
        BadField,
        "first_bit",
    ),
    (
        "first bit beyond the map",
        encode(m.SetCodeMap(1, (m.CodeMapRegion(0, 4096, (1 << 64) - 2),))),
        1,
        BadField,
        "first_bit",
    ),
]
"""Messages by name: bytes, descriptors, error, and the field that the error names."""


@pytest.mark.parametrize(
    ("data", "fds", "error", "field"),
    [pytest.param(*case[1:], id=case[0]) for case in MALFORMED],
)
def test_malformed(data: bytes, fds: int, error: type[ProtocolError], field: str) -> None:
    decoder = Decoder(Direction.REQUESTS)
    decoder.feed(data, tuple(range(fds)))
    with pytest.raises(error) as caught:
        decoder.next_frame()
    assert type(caught.value) is error
    assert caught.value.field == field
    assert field in str(caught.value)
    assert decoder.release_fds() == list(range(fds))
    assert decoder.release_fds() == []


def test_size_is_refused_before_the_payload_is_waited_for() -> None:
    with pytest.raises(Oversized):
        decode(header(1027, 1, 5000), fds=(1, 2))


def test_code_map_may_fill_the_map_to_the_last_bit() -> None:
    message = m.SetCodeMap(1, (m.CodeMapRegion(0, 8 * 4096, 0),))
    frame = decode(encode(message), fds=(5,))
    assert frame is not None
    assert frame.message == message


OFFER_BAD = [("channels", 36, bytes(2)), ("max_channels", 38, bytes(2))]


@pytest.mark.parametrize(("field", "offset", "value"), OFFER_BAD)
def test_malformed_offer(field: str, offset: int, value: bytes) -> None:
    payload = bytearray(OFFER_BYTES)
    payload[offset : offset + 2] = value
    with pytest.raises(BadField) as caught:
        decode(header(1024, 1 | REPLY, 160) + payload, Direction.REPLIES)
    assert caught.value.field == field


def test_a_request_among_replies() -> None:
    with pytest.raises(BadFlags):
        decode(header(1, 1, 8) + bytes(8), Direction.REPLIES)


def test_malformed_backend_requests() -> None:
    direction = Direction.BACKEND_REQUESTS
    with pytest.raises(WrongSize):
        decode(header(1024, 1, 7), direction)
    with pytest.raises(WrongSize):
        decode(header(1024, 1, 8 + 15), direction)
    with pytest.raises(LimitExceeded):
        decode(header(1024, 1, 8 + 16 * 201), direction)
    with pytest.raises(BadField):
        decode(bad(1024, struct.pack("<II", 1, 0)), direction)
    with pytest.raises(BadField):
        decode(bad(1024, struct.pack("<II", 0, 1)), direction)
    with pytest.raises(UnknownRequest):
        decode(header(1, 1, 0), direction)
    with pytest.raises(LimitExceeded):
        m.InvalidateCode(((0, 4096),) * 201).pack()
