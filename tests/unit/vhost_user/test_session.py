# SPDX-License-Identifier: GPL-2.0-or-later
"""The session of the back end: order, features, answers, the end of the stream; no socket."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.vhost_user_session import (
    ANY_REQUEST,
    FEATURES,
    NEGOTIATION,
    NO_REGION,
    OFFER,
    READY,
    BackEnd,
    answer,
    region,
)
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, encode
from vhostvmbus.vhost_user.errors import (
    FeatureMissing,
    FeatureNotOffered,
    NeedReplyMissing,
    OutOfOrder,
    ProtocolError,
    Truncated,
    WrongSize,
)
from vhostvmbus.vhost_user.messages import ProtocolFeature, Request
from vhostvmbus.vhost_user.session import QUERIES, READY_REQUESTS, STEPS, Call, State
from vhostvmbus.wire.ntstatus import NtStatus


def test_negotiation() -> None:
    back_end = BackEnd()
    session = back_end.session
    assert back_end.event(m.GetFeatures()) is None
    assert back_end.reply() == m.Value(1 << 30)
    assert back_end.event(m.GetProtocolFeatures()) is None
    bits = (3, 5, 12, 15, 48, 49, 50, 51)
    assert back_end.reply() == m.Value(sum(1 << bit for bit in bits))
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
        event = back_end.event(message, fds)
        assert back_end.session.state is not State.CLOSED
        # what the session lets through is carried out: see Connection
        assert event is None or isinstance(event.message, m.BackEndWork | m.GetInflightFd)
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


@pytest.mark.parametrize("bit", [0, 1, 10, 13, 19, 47, 52, 63])
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


def test_unplugging_without_its_feature() -> None:
    back_end = BackEnd().negotiate(m.REQUIRED_FEATURES)
    with pytest.raises(FeatureMissing) as caught:
        back_end.event(m.Unplug())
    assert "VMBUS_UNPLUG" in str(caught.value)


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
