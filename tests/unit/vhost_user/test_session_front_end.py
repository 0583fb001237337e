# SPDX-License-Identifier: GPL-2.0-or-later
"""The front end's role of a session."""

from __future__ import annotations

import pytest

from tests.support.vhost_user_session import FEATURES, NEGOTIATION, OFFER, READY, answer
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import REPLY, encode
from vhostvmbus.vhost_user.errors import FeatureMissing, OutOfOrder, UnexpectedReply
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.vhost_user.session import BackEndSession, Call, FrontEndSession, State


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
