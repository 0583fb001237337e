# SPDX-License-Identifier: GPL-2.0-or-later
"""The codec: each message byte by byte, the descriptors that go with it, any chunking."""

from __future__ import annotations

import contextlib
import struct
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vhost_user_messages import (
    BACKEND_REQUESTS,
    OFFER,
    OFFER_BYTES,
    REGION,
    REQUESTS,
    USER_DATA,
    decode,
    header,
)
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, REPLY, Decoder, Direction, Frame, encode
from vhostvmbus.vhost_user.errors import (
    ProtocolError,
    Truncated,
    WrongFds,
)
from vhostvmbus.wire.offer import Offer


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
