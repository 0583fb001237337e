# SPDX-License-Identifier: GPL-2.0-or-later
"""A back-end session without a socket, and every message in its order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from uuid import UUID

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, Decoder, Direction, encode
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.messages import ProtocolFeature, Request
from vhostvmbus.vhost_user.session import BackEndSession, Call, Refused
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening

OFFER = m.OfferReply(Offer(UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"), max_channels=2))
FEATURES = (
    m.REQUIRED_FEATURES
    | ProtocolFeature.VMBUS_CODE_MAP
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.VMBUS_UNPLUG
    | ProtocolFeature.VMBUS_SUSPEND
)


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
    (m.Open(Opening(0, 1, 2)), 2),
    (m.Modify(0, 1), 0),
    (m.Close(0), 0),
    (m.GpadlTeardown(0, 1), 0),
    (m.Reset(), 0),
    (m.Unplug(), 0),
    (m.Suspend(), 0),
    (m.Continue(), 0),
    (m.GetInflightFd(0, 0, 1, 0), 0),
    (m.SetInflightFd(1 << 16, 0, 1, 8), 1),
]
ANY_REQUEST = {Request(message.REQUEST): (message, fds) for message, fds in NEGOTIATION + READY}


NO_REGION = m.InflightReply(0, 0, 0, 0)
"""The answer of a back end that has no in-flight region."""


def answer(session: BackEndSession, call: Call, status: int = 0) -> None:
    """Answers a request, whatever kind it is of."""
    if isinstance(call.message, m.GetInflightFd):
        session.reply(call, NO_REGION)
    else:
        session.answer(call, status)


class BackEnd:
    """A back-end session with the peer's half of the stream."""

    def __init__(
        self, features: ProtocolFeature = FEATURES, limits: ConnectionLimits | None = None
    ) -> None:
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
        """Returns the status that the front end sees."""
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
