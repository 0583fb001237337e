# SPDX-License-Identifier: GPL-2.0-or-later
"""The session of both ends: order, features, limits, answers; without a socket."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.bookkeeping import Limits
from vhostvmbus.vhost_user.codec import NEED_REPLY, REPLY, Decoder, Direction, encode
from vhostvmbus.vhost_user.errors import (
    FeatureMissing,
    FeatureNotOffered,
    NeedReplyMissing,
    OutOfOrder,
    ProtocolError,
    Truncated,
    UnexpectedReply,
    WrongSize,
)
from vhostvmbus.vhost_user.messages import ProtocolFeature, Request
from vhostvmbus.vhost_user.session import (
    QUERIES,
    READY_REQUESTS,
    STEPS,
    BackEndSession,
    Call,
    FrontEndSession,
    Refused,
    State,
)
from vhostvmbus.wire.ntstatus import NtStatus

OFFER = m.OfferReply(
    UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"), UUID(int=0), 0, 0, 1, 2, bytes(120)
)
FEATURES = m.REQUIRED_FEATURES | ProtocolFeature.VMBUS_CODE_MAP | ProtocolFeature.INFLIGHT_SHMFD


def region(start: int, size: int = 0x10_0000, user: int = 0) -> m.MemoryRegion:
    return m.MemoryRegion(start, size, user or start, 0)


NEGOTIATION: list[tuple[m.Message, int]] = [
    (m.GetFeatures(), 0),
    (m.GetProtocolFeatures(), 0),
    (m.SetProtocolFeatures(int(FEATURES)), 0),
    (m.SetFeatures(m.F_PROTOCOL_FEATURES), 0),
    (m.SetOwner(), 0),
    (m.SetBackendReqFd(), 1),
    (m.GetMaxMemSlots(), 0),
    (m.GetOffer(), 0),
]
READY: list[tuple[m.Message, int]] = [
    (m.AddMemReg(region(0)), 1),
    (m.RemMemReg(region(0)), 0),
    (m.SetMemTable((region(0x100_0000),)), 1),
    (m.SetCodeMap(8, ()), 1),
    (m.GpadlCreate(0, 1, 1, 16), 1),
    (m.Open(0, 1, 2, 0, 0, 0, bytes(120)), 2),
    (m.Modify(0, 1), 0),
    (m.Close(0), 0),
    (m.GpadlTeardown(0, 1), 0),
    (m.Reset(), 0),
    (m.GetInflightFd(0, 0, 1, 0), 0),
    (m.SetInflightFd(1 << 16, 0, 1, 8), 1),
]
ANY_REQUEST = {Request(message.REQUEST): (message, fds) for message, fds in NEGOTIATION + READY}


#: the answer of a back end that has no in-flight region
NO_REGION = m.InflightReply(0, 0, 0, 0)


def answer(session: BackEndSession, call: Call, status: int = 0) -> None:
    if isinstance(call.message, m.GetInflightFd):
        session.reply(call, NO_REGION)
    else:
        session.answer(call, status)


class BackEnd:
    """A back-end session with the peer's half of the stream."""

    def __init__(self, features: ProtocolFeature = FEATURES, limits: Limits | None = None) -> None:
        self.session = BackEndSession(OFFER, features, limits)
        self.replies = Decoder(Direction.REPLIES)
        self.numbers: Iterator[int] = count(100)

    def put(self, message: m.Message, fds: int = 0, need_reply: bool = True) -> None:
        data = encode(message, flags=NEED_REPLY if need_reply else 0)
        self.session.receive_data(data, [next(self.numbers) for _ in range(fds)])

    def event(
        self, message: m.Message, fds: int = 0, need_reply: bool = True
    ) -> Call | Refused | None:
        self.put(message, fds, need_reply)
        return self.session.next_event()

    def call(self, message: m.Message, fds: int = 0, status: int = 0) -> int:
        """The status that the front end sees."""
        event = self.event(message, fds)
        if isinstance(event, Call):
            assert event.message == message
            assert len(event.fds) == fds
            answer(self.session, event, status)
        return self.status()

    def reply(self) -> m.Message | None:
        self.replies.feed(self.session.data_to_send())
        frame = self.replies.next_frame()
        return frame.message if frame else None

    def status(self) -> int:
        reply = self.reply()
        if reply == NO_REGION:
            return 0
        assert isinstance(reply, m.Value)
        return reply.value

    def negotiate(self, features: ProtocolFeature = FEATURES, until: int = 8) -> BackEnd:
        for message, fds in NEGOTIATION[:until]:
            if isinstance(message, m.SetProtocolFeatures):
                message = m.SetProtocolFeatures(int(features))
            event = self.event(message, fds)
            if isinstance(event, Call):
                self.session.answer(event)
            assert self.reply() is not None
        return self


def test_negotiation() -> None:
    back_end = BackEnd()
    session = back_end.session
    assert back_end.event(m.GetFeatures()) is None
    assert back_end.reply() == m.Value(1 << 30)
    assert back_end.event(m.GetProtocolFeatures()) is None
    assert back_end.reply() == m.Value(1 << 3 | 1 << 5 | 1 << 12 | 1 << 15 | 1 << 48 | 1 << 49)
    assert back_end.call(m.SetProtocolFeatures(int(FEATURES))) == 0
    assert session.protocol_features == FEATURES
    assert back_end.call(m.SetFeatures(1 << 30)) == 0
    assert back_end.call(m.SetOwner()) == 0
    assert back_end.call(m.SetBackendReqFd(), 1) == 0
    assert back_end.event(m.GetMaxMemSlots()) is None
    assert back_end.reply() == m.Value(100)
    assert back_end.event(m.GetOffer()) is None
    assert back_end.reply() == OFFER
    assert session.state is State.READY


def test_negotiation_without_need_reply_has_no_acknowledgements() -> None:
    back_end = BackEnd()
    for message, fds in NEGOTIATION:
        event = back_end.event(message, fds, need_reply=False)
        if isinstance(event, Call):
            back_end.session.answer(event)
        assert (back_end.reply() is not None) == (message.REQUEST in QUERIES)
    assert back_end.session.state is State.READY


def test_everything_after_the_negotiation() -> None:
    back_end = BackEnd().negotiate()
    for message, fds in READY:
        assert back_end.call(message, fds) == 0, message
    assert back_end.session.state is State.READY
    assert {message.REQUEST for message, _ in READY} == READY_REQUESTS


def test_the_table_names_every_request() -> None:
    assert {request for _, request in STEPS} | READY_REQUESTS == set(Request)


@pytest.mark.parametrize("done", range(9))
@pytest.mark.parametrize("request_number", list(Request))
def test_order(done: int, request_number: Request) -> None:
    """At every point of the negotiation only the next step, and in the end no step, is taken."""
    back_end = BackEnd().negotiate(until=done)
    message, fds = ANY_REQUEST[request_number]
    expected = NEGOTIATION[done][0].REQUEST if done < len(NEGOTIATION) else None
    if request_number == expected or (expected is None and request_number in READY_REQUESTS):
        back_end.event(message, fds)
        assert back_end.session.state is not State.CLOSED
        return
    with pytest.raises(OutOfOrder) as caught:
        back_end.event(message, fds)
    assert caught.value.value == request_number
    assert request_number.name in str(caught.value)
    assert back_end.session.state is State.CLOSED
    assert len(back_end.session.release_fds()) == fds
    assert back_end.session.data_to_send() == b""


def test_nothing_is_taken_after_an_error() -> None:
    back_end = BackEnd().negotiate()
    with pytest.raises(OutOfOrder):
        back_end.event(m.SetOwner())
    back_end.put(m.Reset())
    with pytest.raises(OutOfOrder):
        back_end.session.next_event()


@pytest.mark.parametrize("feature", list(m.REQUIRED_FEATURES))
def test_required_feature_missing(feature: ProtocolFeature) -> None:
    with pytest.raises(FeatureMissing) as caught:
        BackEnd().negotiate(FEATURES & ~feature)
    assert str(feature.name) in str(caught.value)


@pytest.mark.parametrize("bit", [0, 1, 10, 13, 19, 47, 50, 63])
def test_feature_that_was_not_offered(bit: int) -> None:
    back_end = BackEnd().negotiate(until=2)
    with pytest.raises(FeatureNotOffered):
        back_end.event(m.SetProtocolFeatures(int(FEATURES) | 1 << bit))


@pytest.mark.parametrize("bit", [0, 26, 32])
def test_virtio_feature_that_was_not_offered(bit: int) -> None:
    back_end = BackEnd().negotiate(until=3)
    with pytest.raises(FeatureNotOffered):
        back_end.event(m.SetFeatures(1 << 30 | 1 << bit))


@pytest.mark.parametrize("message", [m.GetInflightFd(0, 0, 1, 0), m.SetInflightFd(1, 0, 1, 1)])
def test_in_flight_region_without_its_feature(message: m.Message) -> None:
    back_end = BackEnd().negotiate(m.REQUIRED_FEATURES)
    with pytest.raises(FeatureMissing) as caught:
        back_end.event(message, message.FDS[0])
    assert "INFLIGHT_SHMFD" in str(caught.value)


def test_a_query_is_answered_once() -> None:
    back_end = BackEnd().negotiate()
    event = back_end.event(m.GetInflightFd(0, 0, 1, 0))
    assert isinstance(event, Call)
    back_end.session.reply(event, NO_REGION)
    with pytest.raises(ValueError, match="once"):
        back_end.session.reply(event, NO_REGION)


def test_code_map_without_its_feature() -> None:
    back_end = BackEnd().negotiate(m.REQUIRED_FEATURES)
    with pytest.raises(FeatureMissing) as caught:
        back_end.event(m.SetCodeMap(8, ()), 1)
    assert "VMBUS_CODE_MAP" in str(caught.value)
    assert len(back_end.session.release_fds()) == 1


@pytest.mark.parametrize("message", [item for item in READY if item[0].REQUEST >= 1024])
def test_vmbus_request_without_need_reply(message: tuple[m.Message, int]) -> None:
    back_end = BackEnd().negotiate()
    with pytest.raises(NeedReplyMissing):
        back_end.event(*message, need_reply=False)


def test_status_reaches_the_front_end_as_32_bits() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.Reset(), status=0xC000009A) == 0xC000009A
    assert back_end.call(m.Reset(), status=NtStatus.ACCESS_DENIED - (1 << 32)) == 0xC0000022


def test_memory_without_need_reply() -> None:
    back_end = BackEnd().negotiate()
    event = back_end.event(m.AddMemReg(region(0)), 1, need_reply=False)
    assert isinstance(event, Call)
    back_end.session.answer(event)
    assert back_end.reply() is None
    event = back_end.event(m.AddMemReg(region(0x800_0000)), 1, need_reply=False)
    assert isinstance(event, Call)
    with pytest.raises(NeedReplyMissing):
        back_end.session.answer(event, NtStatus.NO_MEMORY)
    assert back_end.session.state is State.CLOSED


def test_refusal_that_nobody_waits_for_ends_the_session() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    with pytest.raises(NeedReplyMissing) as caught:
        back_end.event(m.AddMemReg(region(0x8_0000)), 1, need_reply=False)
    assert "overlap" in str(caught.value)
    assert len(back_end.session.release_fds()) == 1


def test_one_call_at_a_time() -> None:
    back_end = BackEnd().negotiate()
    first = back_end.event(m.Reset())
    assert isinstance(first, Call)
    assert back_end.event(m.Close(0)) is None
    assert back_end.reply() is None
    back_end.session.answer(first, 1)
    assert back_end.status() == 1
    second = back_end.session.next_event()
    assert isinstance(second, Call)
    with pytest.raises(ValueError, match="once"):
        back_end.session.answer(first)
    back_end.session.answer(second, 2)
    assert back_end.status() == 2
    with pytest.raises(ValueError, match="once"):
        back_end.session.answer(second)


# ---- the memory table and the limits ----------------------------------------------------


def test_overlapping_regions() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0x10_0000)), 1) == 0
    for start, size in [
        (0x10_0000, 0x10_0000),
        (0x1F_F000, 0x1000),
        (0xF_F000, 0x2000),
        (0, 1 << 40),
    ]:
        event = back_end.event(m.AddMemReg(region(start, size)), 1)
        assert isinstance(event, Refused)
        assert event.refusal.status is NtStatus.CONFLICTING_ADDRESSES
        assert len(event.fds) == 1
        assert back_end.status() == NtStatus.CONFLICTING_ADDRESSES
    assert back_end.call(m.AddMemReg(region(0x20_0000)), 1) == 0
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0


def test_a_region_that_was_refused_does_not_exist() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1, NtStatus.NO_MEMORY) == NtStatus.NO_MEMORY
    assert back_end.call(m.RemMemReg(region(0))) == NtStatus.INVALID_PARAMETER
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    assert back_end.call(m.RemMemReg(region(0))) == 0
    assert back_end.call(m.RemMemReg(region(0))) == NtStatus.INVALID_PARAMETER


def test_removal_names_the_region_exactly() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0x1000, 0x1000, 0x5000)), 1) == 0
    for wrong in [
        region(0x1000, 0x2000, 0x5000),
        region(0x1000, 0x1000, 0x6000),
        region(0x2000, 0x1000, 0x5000),
    ]:
        assert back_end.call(m.RemMemReg(wrong)) == NtStatus.INVALID_PARAMETER
    # "the mmap offset is ignored"; a descriptor may come along
    assert back_end.call(m.RemMemReg(m.MemoryRegion(0x1000, 0x1000, 0x5000, 0x7000)), 1) == 0


def test_memory_slots() -> None:
    back_end = BackEnd(limits=Limits(mem_slots=2)).negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    assert back_end.call(m.AddMemReg(region(1 << 30)), 1) == 0
    refused = back_end.call(m.AddMemReg(region(2 << 30)), 1)
    assert refused == NtStatus.INSUFFICIENT_RESOURCES
    assert back_end.call(m.RemMemReg(region(0))) == 0
    assert back_end.call(m.AddMemReg(region(2 << 30)), 1) == 0


def test_memory_table() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    table = tuple(region(i << 30) for i in range(1, 9))
    assert back_end.call(m.SetMemTable(table), 8) == 0
    assert back_end.call(m.RemMemReg(region(0))) == NtStatus.INVALID_PARAMETER
    assert back_end.call(m.RemMemReg(region(8 << 30))) == 0
    overlapping = (region(0), region(0x8_0000))
    assert back_end.call(m.SetMemTable(overlapping), 2) == NtStatus.CONFLICTING_ADDRESSES
    assert back_end.call(m.SetMemTable(())) == 0
    assert back_end.session.books.regions == {}


def test_opening_before_there_is_memory() -> None:
    back_end = BackEnd().negotiate()
    opening = m.Open(0, 1, 2, 0, 0, 0, bytes(120))
    event = back_end.event(opening, 2)
    assert isinstance(event, Refused)
    assert len(event.fds) == 2
    assert back_end.status() == NtStatus.INVALID_DEVICE_STATE
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    assert back_end.call(opening, 2) == 0
    assert back_end.call(m.RemMemReg(region(0))) == 0
    assert back_end.call(opening, 2) == NtStatus.INVALID_DEVICE_STATE


def test_long_gpadl_list_and_big_code_map() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.GpadlCreate(0, 1, 1, 4 << 20), 1) == 0
    too_long = m.GpadlCreate(0, 1, 1, (4 << 20) + 8)
    assert back_end.call(too_long, 1) == NtStatus.INSUFFICIENT_RESOURCES
    assert back_end.call(m.SetCodeMap(1 << 30, ()), 1) == 0
    too_big = m.SetCodeMap((1 << 30) + 1, ())
    assert back_end.call(too_big, 1) == NtStatus.INSUFFICIENT_RESOURCES


# ---- ends of the stream -----------------------------------------------------------------


def test_end_inside_a_message() -> None:
    back_end = BackEnd().negotiate()
    back_end.session.receive_data(encode(m.AddMemReg(region(0)))[:30], [55])
    assert back_end.session.next_event() is None
    with pytest.raises(Truncated):
        back_end.session.receive_end()
    assert back_end.session.state is State.CLOSED
    assert back_end.session.release_fds() == [55]


def test_descriptors_of_the_broken_request_stay_known_when_asked_again() -> None:
    back_end = BackEnd().negotiate()
    back_end.put(m.SetOwner(), need_reply=True)
    back_end.put(m.AddMemReg(region(0)), 1, need_reply=False)
    for _ in range(3):
        with pytest.raises(ProtocolError):
            back_end.session.next_event()
    assert len(back_end.session.release_fds()) == 1
    assert back_end.session.release_fds() == []


def test_descriptors_of_the_request_that_broke_the_session() -> None:
    back_end = BackEnd().negotiate()
    back_end.put(m.GpadlCreate(0, 1, 1, 16), 1, need_reply=False)
    for _ in range(3):
        with pytest.raises(ProtocolError):
            back_end.session.next_event()
    assert back_end.session.release_fds() == [101]
    assert back_end.session.release_fds() == []


def test_clean_end() -> None:
    back_end = BackEnd().negotiate()
    back_end.session.receive_end()
    assert back_end.session.state is State.CLOSED


def test_malformed_message_ends_the_session_with_its_descriptors_in_hand() -> None:
    back_end = BackEnd().negotiate()
    back_end.session.receive_data(b"\x25\0\0\0\1\0\0\0\7\0\0\0", [8])
    with pytest.raises(WrongSize):
        back_end.session.next_event()
    assert back_end.session.state is State.CLOSED
    assert back_end.session.release_fds() == [8]


@given(
    st.lists(st.tuples(st.sampled_from(list(ANY_REQUEST.values())), st.integers(0, 3)), max_size=40)
)
def test_descriptors_are_never_lost(steps: list[tuple[tuple[m.Message, int], int]]) -> None:
    """Any requests in any order, with any number of descriptors."""
    back_end = BackEnd().negotiate()
    given_fds: list[int] = []
    seen: list[int] = []
    for (message, right), wrong in steps:
        fds = [next(back_end.numbers) for _ in range(right if wrong < 3 else wrong)]
        given_fds += fds
        try:
            back_end.session.receive_data(encode(message, flags=NEED_REPLY), fds)
            event = back_end.session.next_event()
        except ProtocolError:
            assert back_end.session.state is State.CLOSED
            break
        assert event is not None
        seen += event.fds
        if isinstance(event, Call):
            answer(back_end.session, event)
        assert back_end.reply() is not None
    assert seen + back_end.session.release_fds() == given_fds


# ---- the front end's role ---------------------------------------------------------------


def connect(
    front: FrontEndSession, back: BackEndSession, message: m.Message, fds: int = 0
) -> m.Message | None:
    """Send `message` through both sessions; what the front end gets for it."""
    front.send(message, fds)
    back.receive_data(front.data_to_send(), tuple(range(fds)))
    event = back.next_event()
    if isinstance(event, Call):
        answer(back, event)
    front.receive_data(back.data_to_send())
    reply = front.next_event()
    if reply is not None:
        assert reply.request == message
        return reply.message
    return None


def test_both_roles_negotiate_with_each_other() -> None:
    front, back = FrontEndSession(FEATURES), BackEndSession(OFFER)
    for message, fds in NEGOTIATION + READY:
        assert connect(front, back, message, fds) is not None
        assert front.state is back.state
    assert front.state is State.READY
    assert front.wanted_features == FEATURES


def test_the_front_end_drops_what_is_not_offered() -> None:
    front, back = FrontEndSession(FEATURES), BackEndSession(OFFER, m.REQUIRED_FEATURES)
    for message, _ in NEGOTIATION[:2]:
        connect(front, back, message)
    assert front.wanted_features == m.REQUIRED_FEATURES


@pytest.mark.parametrize("feature", list(m.REQUIRED_FEATURES))
def test_the_front_end_names_the_missing_feature(feature: ProtocolFeature) -> None:
    front = FrontEndSession()
    front.send(m.GetFeatures())
    front.receive_data(encode(m.Value(1 << 30), request=1, flags=REPLY))
    assert front.next_event() is not None
    front.send(m.GetProtocolFeatures())
    front.receive_data(encode(m.Value(int(FEATURES & ~feature)), request=15, flags=REPLY))
    with pytest.raises(FeatureMissing) as caught:
        front.next_event()
    assert str(feature.name) in str(caught.value)
    assert front.state is State.CLOSED


def test_the_front_end_needs_protocol_features_at_all() -> None:
    front = FrontEndSession()
    front.send(m.GetFeatures())
    front.receive_data(encode(m.Value(0), request=1, flags=REPLY))
    with pytest.raises(FeatureMissing):
        front.next_event()


def test_the_front_end_keeps_the_order() -> None:
    front = FrontEndSession()
    with pytest.raises(OutOfOrder):
        front.send(m.GetOffer())
    with pytest.raises(ValueError, match="descriptors"):
        front.send(m.GetFeatures(), 1)


@pytest.mark.parametrize("answered", [2, 1024])
def test_a_reply_to_something_else(answered: int) -> None:
    front = FrontEndSession()
    front.send(m.GetFeatures())
    reply = OFFER if answered == 1024 else m.Value(0)
    front.receive_data(encode(reply, request=answered, flags=REPLY))
    with pytest.raises(UnexpectedReply):
        front.next_event()


def test_a_reply_to_nothing() -> None:
    front = FrontEndSession()
    front.receive_data(encode(m.Value(0), request=1, flags=REPLY))
    with pytest.raises(UnexpectedReply):
        front.next_event()
