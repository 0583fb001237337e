# SPDX-License-Identifier: GPL-2.0-or-later
"""The codec: each message byte by byte, every malformed variant, any chunking."""

from __future__ import annotations

import contextlib
import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, REPLY, Decoder, Direction, Frame, encode
from vhostvmbus.vhost_user.errors import (
    BadField,
    BadFlags,
    BadVersion,
    LimitExceeded,
    Oversized,
    ProtocolError,
    Truncated,
    UnknownRequest,
    WrongFds,
    WrongSize,
)
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import EVERY_PAGE

CLASS_ID = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
REGION = m.MemoryRegion(0x1_0000_0000, 0x20_0000, 0x7F00_0000_0000, 0x3000)
REGION_BYTES = (
    bytes.fromhex("0000000001000000")
    + bytes.fromhex("0000200000000000")
    + bytes.fromhex("00000000007f0000")
    + bytes.fromhex("0030000000000000")
)
USER_DATA = bytes(range(120))

#: message, number, payload as the specification has it, descriptors
REQUESTS: list[tuple[m.Message, int, bytes, int]] = [
    (m.GetFeatures(), 1, b"", 0),
    (m.SetFeatures(1 << 30), 2, b"\0\0\0\x40\0\0\0\0", 0),
    (m.SetOwner(), 3, b"", 0),
    (m.SetMemTable(()), 5, bytes(8), 0),
    (m.SetMemTable((REGION, REGION)), 5, b"\2" + bytes(7) + REGION_BYTES * 2, 2),
    (m.GetProtocolFeatures(), 15, b"", 0),
    (m.SetProtocolFeatures(1 << 48), 16, bytes(6) + b"\1\0", 0),
    (m.SetBackendReqFd(), 21, b"", 1),
    (m.GetMaxMemSlots(), 36, b"", 0),
    (m.AddMemReg(REGION), 37, bytes(8) + REGION_BYTES, 1),
    (m.RemMemReg(REGION), 38, bytes(8) + REGION_BYTES, 0),
    (m.RemMemReg(REGION), 38, bytes(8) + REGION_BYTES, 1),
    (m.GetOffer(), 1024, b"", 0),
    (m.GpadlCreate(1, 0xE1E10, 2, 64), 1025, struct.pack("<IIII", 1, 0xE1E10, 2, 64), 1),
    (m.GpadlTeardown(1, 0xE1E10), 1026, struct.pack("<II", 1, 0xE1E10), 0),
    (
        m.Open(Opening(3, 0xE1E10, 4, 1, 0x50003, USER_DATA, True)),
        1027,
        struct.pack("<IIIIII", 3, 0xE1E10, 4, 1, 0x50003, 1) + USER_DATA,
        2,
    ),
    (m.Close(2), 1028, b"\2" + bytes(7), 0),
    (m.Modify(2, 3), 1029, b"\2\0\0\0\3\0\0\0", 0),
    (m.Reset(), 1030, b"", 0),
    (
        m.SetCodeMap(16, (m.CodeMapRegion(0x10_0000, 0x8_0000, 0),)),
        1031,
        struct.pack("<QIIQQQ", 16, 1, 0, 0x10_0000, 0x8_0000, 0),
        1,
    ),
    (
        m.SetCodeMap(0, (m.CodeMapRegion(0, 1 << 32, EVERY_PAGE),)),
        1031,
        struct.pack("<QIIQQ", 0, 1, 0, 0, 1 << 32) + b"\xff" * 8,
        1,
    ),
    (m.Unplug(), 1032, b"", 0),
    (m.GetInflightFd(0, 0, 4, 0), 31, bytes(16) + b"\4" + bytes(7), 0),
    (m.SetInflightFd(0x9000, 0x1000, 4, 8), 32, struct.pack("<QQHHI", 0x9000, 0x1000, 4, 8, 0), 1),
]
OFFER = m.OfferReply(Offer(CLASS_ID, None, 0x10, 2, 1, 4, USER_DATA))
OFFER_BYTES = (
    bytes.fromhex("d96361baa104294db60572e2ffb1dc7f")
    + bytes(16)
    + bytes.fromhex("1000 0200 0100 0400")
    + USER_DATA
)
BACKEND_REQUESTS: list[tuple[m.Message, int, bytes]] = [
    (m.InvalidateCode(()), 1024, bytes(8)),
    (
        m.InvalidateCode(((0x1000, 0x2000), (0x8000, 0x1000))),
        1024,
        struct.pack("<IIQQQQ", 2, 0, 0x1000, 0x2000, 0x8000, 0x1000),
    ),
    (m.OfferChannel(3), 1025, b"\3" + bytes(7)),
    (m.RescindChannel(0), 1026, bytes(8)),
]


def header(request: int, flags: int, size: int) -> bytes:
    return struct.pack("<III", request, flags, size)


def decode(
    data: bytes, direction: Direction = Direction.REQUESTS, fds: tuple[int, ...] = ()
) -> Frame | None:
    decoder = Decoder(direction)
    decoder.feed(data, fds)
    return decoder.next_frame()


@pytest.mark.parametrize(("message", "number", "payload", "fds"), REQUESTS)
def test_request_bytes(message: m.Message, number: int, payload: bytes, fds: int) -> None:
    data = header(number, 1 | NEED_REPLY, len(payload)) + payload
    assert encode(message, flags=NEED_REPLY) == data
    given_fds = tuple(range(100, 100 + fds))
    assert decode(data, fds=given_fds) == Frame(number, message, True, given_fds)


def test_every_request_is_covered() -> None:
    assert {number for _, number, _, _ in REQUESTS} == set(m.Request)
    assert {number for _, number, _ in BACKEND_REQUESTS} == set(m.BackendRequest)
    assert set(m.FRONT_END_REQUESTS) == set(m.Request)
    assert set(m.BACK_END_REQUESTS) == set(m.BackendRequest)


def test_sizes_are_those_of_the_specification() -> None:
    assert m.OfferReply.LAYOUT.size == 160
    assert m.Open.LAYOUT.size == 144
    assert m.AddMemReg.LAYOUT.size == 40


def test_offer_bytes() -> None:
    data = header(1024, 1 | REPLY, 160) + OFFER_BYTES
    assert encode(OFFER, flags=REPLY) == data
    assert decode(data, Direction.REPLIES) == Frame(1024, OFFER, False, ())


def test_inflight_reply_bytes() -> None:
    reply = m.InflightReply(0x9000, 0, 4, 8)
    data = header(31, 1 | REPLY, 24) + struct.pack("<QQHHI", 0x9000, 0, 4, 8, 0)
    assert encode(reply, flags=REPLY) == data
    assert decode(data, Direction.REPLIES, (7,)) == Frame(31, reply, False, (7,))
    with pytest.raises(WrongFds):
        decode(data, Direction.REPLIES)
    nothing = header(31, 1 | REPLY, 24) + bytes(24)
    assert decode(nothing, Direction.REPLIES) == Frame(31, m.InflightReply(0, 0, 0, 0), False, ())


@pytest.mark.parametrize(
    "request_number",
    sorted(set(m.Request) - {m.Request.VMBUS_GET_OFFER, m.Request.GET_INFLIGHT_FD}),
)
def test_value_reply_bytes(request_number: int) -> None:
    data = header(request_number, 1 | REPLY, 8) + b"\x0d\0\0\xc0\0\0\0\0"
    assert encode(m.Value(0xC000000D), request=request_number, flags=REPLY) == data
    frame = decode(data, Direction.REPLIES)
    assert frame == Frame(request_number, m.Value(0xC000000D), False, ())


@pytest.mark.parametrize(("message", "number", "payload"), BACKEND_REQUESTS)
def test_backend_request_bytes(message: m.Message, number: int, payload: bytes) -> None:
    data = header(number, 1 | NEED_REPLY, len(payload)) + payload
    assert encode(message, flags=NEED_REPLY) == data
    assert decode(data, Direction.BACKEND_REQUESTS) == Frame(number, message, True, ())
    answer = encode(m.Value(0), request=number, flags=REPLY)
    assert decode(answer, Direction.BACKEND_REPLIES) == Frame(number, m.Value(0), False, ())


def test_a_reply_may_echo_need_reply() -> None:
    frame = decode(header(1, 1 | REPLY | NEED_REPLY, 8) + bytes(8), Direction.REPLIES)
    assert frame is not None
    assert not frame.need_reply


def bad(number: int, payload: bytes, flags: int = 1) -> bytes:
    return header(number, flags, len(payload)) + payload


def replaced(message: m.Message, offset: int, value: bytes) -> bytes:
    payload = bytearray(message.pack())
    payload[offset : offset + len(value)] = value
    return bad(message.REQUEST, bytes(payload))


REGION_AT_END = m.AddMemReg(m.MemoryRegion((1 << 64) - 0x1000, 0x1000, 0, 0))

#: name, bytes, descriptors, error, field named by it
MALFORMED: list[tuple[str, bytes, int, type[ProtocolError], str]] = [
    ("version 0", header(1, 0, 0), 0, BadVersion, "version"),
    ("version 2", header(1, 2, 0), 0, BadVersion, "version"),
    ("version 3", header(1, 3, 0), 0, BadVersion, "version"),
    ("undefined flag", header(1, 1 | 16, 0), 0, BadFlags, "flags"),
    ("highest flag", header(1, 1 | 1 << 31, 0), 0, BadFlags, "flags"),
    ("a reply among requests", header(1, 1 | REPLY, 0), 0, BadFlags, "flags"),
    ("request 0", header(0, 1, 0), 0, UnknownRequest, "request"),
    ("SET_VRING_NUM", header(8, 1, 8), 0, UnknownRequest, "request"),
    ("request 1033", header(1033, 1, 0), 0, UnknownRequest, "request"),
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


def test_descriptors_in_the_middle_of_a_message() -> None:
    decoder = Decoder(Direction.REQUESTS)
    data = encode(m.AddMemReg(REGION))
    decoder.feed(data[:20])
    decoder.feed(data[20:], (7,))
    with pytest.raises(WrongFds):
        decoder.next_frame()
    assert decoder.release_fds() == [7]


def test_descriptors_in_the_middle_of_a_header() -> None:
    decoder = Decoder(Direction.REQUESTS)
    data = encode(m.AddMemReg(REGION))
    decoder.feed(data[:5])
    assert decoder.next_frame() is None
    decoder.feed(data[5:6], (7, 8))
    with pytest.raises(WrongFds):
        decoder.next_frame()
    assert decoder.release_fds() == [7, 8]


def test_descriptors_without_bytes() -> None:
    decoder = Decoder(Direction.REQUESTS)
    with pytest.raises(WrongFds):
        decoder.feed(b"", (3,))
    assert decoder.release_fds() == [3]


def test_descriptors_stay_with_their_message_in_one_feed_after_another() -> None:
    decoder = Decoder(Direction.REQUESTS)
    decoder.feed(encode(m.GetFeatures()))
    decoder.feed(encode(m.AddMemReg(REGION)), (9,))
    decoder.feed(encode(m.SetOwner()))
    frames = [decoder.next_frame() for _ in range(3)]
    assert [frame.fds for frame in frames if frame] == [(), (9,), ()]
    assert decoder.release_fds() == []


@pytest.mark.parametrize("cut", range(1, 52))
def test_truncated(cut: int) -> None:
    decoder = Decoder(Direction.REQUESTS)
    decoder.feed(encode(m.AddMemReg(REGION))[:cut], (4,))
    assert decoder.next_frame() is None
    with pytest.raises(Truncated):
        decoder.end()
    assert decoder.release_fds() == [4]


def test_end_between_messages() -> None:
    decoder = Decoder(Direction.REQUESTS)
    decoder.feed(encode(m.SetOwner()))
    assert decoder.next_frame() is not None
    decoder.end()


def test_wanted_leads_exactly_to_the_end_of_each_message() -> None:
    stream = b"".join(encode(message) for message, _, _, _ in REQUESTS)
    decoder = Decoder(Direction.REQUESTS)
    at = 0
    for message, number, _, count in REQUESTS:
        fds = tuple(range(count))
        while (frame := decoder.next_frame()) is None:
            size = decoder.wanted
            assert size > 0
            decoder.feed(stream[at : at + size], () if decoder.in_message else fds)
            at += size
        assert frame == Frame(number, message, False, fds)
    assert at == len(stream)


@given(st.data())
def test_any_chunking_gives_the_same_frames(data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from([r for r in REQUESTS if r[3] == 0]), min_size=1))
    stream = b"".join(encode(message) for message, _, _, _ in chosen)
    decoder = Decoder(Direction.REQUESTS)
    frames = []
    at = 0
    while at < len(stream):
        size = data.draw(st.integers(1, 60))
        decoder.feed(stream[at : at + size])
        at += size
        while (frame := decoder.next_frame()) is not None:
            frames.append(frame.message)
    assert frames == [message for message, _, _, _ in chosen]
    decoder.end()


@given(st.binary(max_size=300), st.integers(0, 9), st.sampled_from(list(Direction)))
def test_random_bytes_only_ever_raise_named_errors(
    data: bytes, count: int, direction: Direction
) -> None:
    decoder = Decoder(direction)
    handed_out: list[int] = []
    with contextlib.suppress(ProtocolError):
        decoder.feed(data, tuple(range(count)))
        while (frame := decoder.next_frame()) is not None:
            handed_out += frame.fds
    assert handed_out + decoder.release_fds() == list(range(count))


@given(st.sampled_from(REQUESTS), st.data())
def test_one_changed_byte_is_a_message_or_a_named_error(
    case: tuple[m.Message, int, bytes, int], data: st.DataObject
) -> None:
    raw = bytearray(encode(case[0]))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    fds = tuple(range(data.draw(st.integers(0, 9))))
    try:
        frame = decode(bytes(raw), fds=fds)
    except ProtocolError:
        return
    if frame is not None:
        assert frame.fds == fds
        if isinstance(frame.message, m.AddMemReg | m.RemMemReg | m.SetMemTable):
            return  # these have padding that is not looked at
        assert frame.message.pack() == bytes(raw[12:])


u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)


@given(st.lists(st.tuples(u64, u64), max_size=200))
def test_invalidate_round_trip(ranges: list[tuple[int, int]]) -> None:
    message = m.InvalidateCode(tuple(ranges))
    data = encode(message)
    assert len(data) <= 12 + m.MAX_PAYLOAD
    frame = decode(data, Direction.BACKEND_REQUESTS)
    assert frame is not None
    assert frame.message == message


@given(st.uuids(), st.uuids(), st.lists(st.integers(1, 0xFFFF), min_size=2, max_size=2))
def test_offer_round_trip(class_id: UUID, instance_id: UUID, channels: list[int]) -> None:
    first, most = sorted(channels)
    offer = m.OfferReply(Offer(class_id, instance_id, 0xFFFF, 0, first, most, USER_DATA))
    frame = decode(encode(offer, flags=REPLY), Direction.REPLIES)
    assert frame is not None
    assert frame.message == offer
