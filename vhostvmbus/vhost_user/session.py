# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of a session, for both ends, without I/O ("Negotiation").

A session takes bytes and descriptors, and gives events and bytes. :data:`STEPS` and
:data:`READY_REQUESTS` are the whole state table; both roles obey it, the back end for what it
receives and the front end for what it sends, so a front end cannot even send what a back end would
not take.

Two kinds of wrong are told apart. What breaks the protocol raises a :class:`~.errors.ProtocolError`
and ends the session for good. What is in order but cannot be done (an overlapping region, a GPADL
beyond the limits) is answered with an NTSTATUS and reported as :class:`Refused`; the session goes
on.

Invariants: requests are answered in the order in which they came; after an error the session
accepts and sends nothing; descriptors belong to whoever got the event, and those that nobody got
are in :meth:`Session.release_fds`.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, REPLY, Decoder, Direction, Frame, encode
from vhostvmbus.vhost_user.errors import (
    FeatureMissing,
    FeatureNotOffered,
    NeedReplyMissing,
    OutOfOrder,
    ProtocolError,
    UnexpectedReply,
)
from vhostvmbus.vhost_user.limits import ConnectionLimits, Refusal
from vhostvmbus.vhost_user.memory_table import MemoryTable
from vhostvmbus.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    REQUIRED_FEATURES,
    Message,
    ProtocolFeature,
    Request,
)


class State(enum.Enum):
    """A stage of a session; the name says what was done last."""

    CONNECTED = enum.auto()
    FEATURES_KNOWN = enum.auto()
    PROTOCOL_FEATURES_KNOWN = enum.auto()
    PROTOCOL_FEATURES_SET = enum.auto()
    FEATURES_SET = enum.auto()
    OWNED = enum.auto()
    BACKEND_CHANNEL_SET = enum.auto()
    MEM_SLOTS_KNOWN = enum.auto()
    READY = enum.auto()
    CLOSED = enum.auto()


STEPS: dict[tuple[State, Request], State] = {
    (State.CONNECTED, Request.GET_FEATURES): State.FEATURES_KNOWN,
    (State.FEATURES_KNOWN, Request.GET_PROTOCOL_FEATURES): State.PROTOCOL_FEATURES_KNOWN,
    (State.PROTOCOL_FEATURES_KNOWN, Request.SET_PROTOCOL_FEATURES): State.PROTOCOL_FEATURES_SET,
    (State.PROTOCOL_FEATURES_SET, Request.SET_FEATURES): State.FEATURES_SET,
    (State.FEATURES_SET, Request.SET_OWNER): State.OWNED,
    (State.OWNED, Request.SET_BACKEND_REQ_FD): State.BACKEND_CHANNEL_SET,
    (State.BACKEND_CHANNEL_SET, Request.GET_MAX_MEM_SLOTS): State.MEM_SLOTS_KNOWN,
    (State.MEM_SLOTS_KNOWN, Request.VMBUS_GET_OFFER): State.READY,
}
"""The next state for a state and a request, in the part of a session that has one order."""

READY_REQUESTS = frozenset(
    {
        Request.ADD_MEM_REG,
        Request.REM_MEM_REG,
        Request.SET_MEM_TABLE,
        Request.VMBUS_GPADL_CREATE,
        Request.VMBUS_GPADL_TEARDOWN,
        Request.VMBUS_OPEN,
        Request.VMBUS_CLOSE,
        Request.VMBUS_MODIFY,
        Request.VMBUS_RESET,
        Request.VMBUS_SET_CODE_MAP,
        Request.VMBUS_UNPLUG,
        Request.VMBUS_SUSPEND,
        Request.VMBUS_CONTINUE,
        Request.GET_INFLIGHT_FD,
        Request.SET_INFLIGHT_FD,
    }
)
"""The requests that may come, in any order, once the negotiation is done; the state stays READY."""

QUERIES = frozenset(
    {
        Request.GET_FEATURES,
        Request.GET_PROTOCOL_FEATURES,
        Request.GET_MAX_MEM_SLOTS,
        Request.VMBUS_GET_OFFER,
        Request.GET_INFLIGHT_FD,
    }
)
"""The requests with a reply of their own; every other one is answered by the reply-ack."""

NEEDS_FEATURE = {
    Request.VMBUS_SET_CODE_MAP: ProtocolFeature.VMBUS_CODE_MAP,
    Request.VMBUS_UNPLUG: ProtocolFeature.VMBUS_UNPLUG,
    Request.VMBUS_SUSPEND: ProtocolFeature.VMBUS_SUSPEND,
    Request.VMBUS_CONTINUE: ProtocolFeature.VMBUS_SUSPEND,
    Request.GET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
    Request.SET_INFLIGHT_FD: ProtocolFeature.INFLIGHT_SHMFD,
}
"""The requests that are of no use without a protocol feature, each with that feature."""

OPTIONAL_FEATURES = (
    ProtocolFeature.VMBUS_CODE_MAP
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.VMBUS_UNPLUG
    | ProtocolFeature.VMBUS_SUSPEND
)
"""The features that a back end offers beyond the required ones."""


def next_state(state: State, request: Request) -> State:
    """Returns the state that follows. Raises :class:`OutOfOrder` if the table has none."""
    if state is State.READY and request in READY_REQUESTS:
        return state
    step = STEPS.get((state, request))
    if step is None:
        raise OutOfOrder(
            f"{request.name} cannot come in state {state.name}", field="request", value=int(request)
        )
    return step


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A request for the back end to carry out and then to :meth:`BackEndSession.answer`.

    The receiver of the event owns ``fds``.
    """

    message: Message
    fds: tuple[int, ...]
    need_reply: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """A request that the session has answered itself, with a status that refuses it.

    The receiver of the event owns ``fds`` and has nothing to do but close them.
    """

    message: Message
    fds: tuple[int, ...]
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Reply:
    """The back end's answer to the front end's ``request``; the receiver owns ``fds``."""

    request: Message
    message: m.Value | m.OfferReply | m.InflightReply
    fds: tuple[int, ...] = ()


class Session:
    """The part that both roles share: a state, a decoder, bytes to send."""

    def __init__(self, incoming: Direction) -> None:
        self.state = State.CONNECTED
        self.protocol_features = ProtocolFeature(0)
        self._decoder = Decoder(incoming)
        self._outgoing = bytearray()

    @property
    def wanted(self) -> int:
        """The number of bytes to read next; see :class:`~.codec.Decoder`."""
        return self._decoder.wanted

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Takes what was read; the events follow from ``next_event``."""
        try:
            self._decoder.feed(data, fds)
        except ProtocolError:
            self.state = State.CLOSED
            raise

    def receive_end(self) -> None:
        """Notes that the peer closed the connection. Raises ``Truncated`` if that was inside a
        message.
        """
        self.state = State.CLOSED
        self._decoder.end()

    def data_to_send(self) -> bytes:
        """Returns the bytes for the peer that have come about since the last call."""
        data = bytes(self._outgoing)
        self._outgoing.clear()
        return data

    def release_fds(self) -> list[int]:
        """Hands over the descriptors that no event carries, for the caller to close."""
        return self._decoder.release_fds()

    def _next_frame(self) -> Frame | None:
        if self.state is State.CLOSED:
            raise OutOfOrder("the session is closed", field="state", value=self.state.name)
        return self._decoder.next_frame()


class BackEndSession(Session):
    """The device's end of a session.

    ``offer`` is what ``VMBUS_GET_OFFER`` is answered with, ``features`` the protocol features on
    offer (the required ones and the code map at least), ``limits`` what one front end may ask for.
    """

    def __init__(
        self,
        offer: m.OfferReply,
        features: ProtocolFeature = REQUIRED_FEATURES | OPTIONAL_FEATURES,
        limits: ConnectionLimits | None = None,
    ) -> None:
        super().__init__(Direction.REQUESTS)
        self.offer = offer
        self.offered = features
        self.limits = limits or ConnectionLimits()
        self.table = MemoryTable(self.limits.mem_slots)
        self._current: Call | None = None
        """The call that is being carried out."""
        self._stray: Sequence[int] = ()
        """The descriptors of the request at which an error ended the session."""

    def next_event(self) -> Call | Refused | None:
        """Returns the next thing for the back end to do, or ``None`` when more bytes are wanted.

        It is also ``None`` while a call is unanswered: requests are carried out one at a time.
        Queries and settings of the negotiation are answered here and make no event. Raises a
        :class:`~.errors.ProtocolError` for what breaks the protocol; the session is closed then.
        """
        fds: tuple[int, ...] = ()
        try:
            while self._current is None and (frame := self._next_frame()) is not None:
                fds = frame.fds
                event = self._take(frame)
                if event is not None:
                    return event
        except ProtocolError:
            self.state = State.CLOSED
            self._stray = (*self._stray, *fds)  # asked again after an error, still all
            raise
        return None

    def release_fds(self) -> list[int]:
        stray, self._stray = list(self._stray), ()
        return stray + super().release_fds()

    def answer(self, call: Call, status: int = 0) -> None:
        """Answers ``call`` with 0, or with the NTSTATUS (32 bits) that refuses it.

        A request that was sent without need-reply has no answer; refusing one raises
        :class:`NeedReplyMissing`, since the front end could not know.
        """
        if self._current is not call:
            raise ValueError("a call is answered once")
        self._current = None
        if status == 0:
            self.table.enter(call.message)
        elif not call.need_reply:
            self.state = State.CLOSED
            raise NeedReplyMissing(
                f"{type(call.message).__name__} failed with status {status:#010x} and nobody "
                "waits for the answer",
                field="request",
                value=call.message.REQUEST,
            )
        self._acknowledge(call.message, call.need_reply, status)

    def reply(self, call: Call, message: Message) -> None:
        """Answers ``call``, a query that the back end carries out, with what was asked for.

        Descriptors go with the first byte of what :meth:`data_to_send` has then, so that has to be
        empty before.
        """
        if self._current is not call:
            raise ValueError("a call is answered once")
        self._current = None
        self._put(call.message, message)

    def _acknowledge(self, message: Message, need_reply: bool, status: int) -> None:
        if need_reply and ProtocolFeature.REPLY_ACK in self.protocol_features:
            self._put(message, m.Value(status & 0xFFFFFFFF))

    def _put(self, request: Message, reply: Message) -> None:
        self._outgoing += encode(reply, request=request.REQUEST, flags=REPLY)

    def _take(self, frame: Frame) -> Call | Refused | None:
        message = frame.message
        request = Request(frame.request)
        self.state = next_state(self.state, request)
        feature = NEEDS_FEATURE.get(request)
        if feature is not None and feature not in self.protocol_features:
            raise FeatureMissing(
                f"{request.name} without {feature.name} set", field="request", value=int(request)
            )
        if request >= Request.VMBUS_GET_OFFER and request not in QUERIES and not frame.need_reply:
            raise NeedReplyMissing(
                f"{request.name} came without need-reply", field="request", value=int(request)
            )
        if self._negotiate(message):
            if request not in QUERIES:
                self._acknowledge(message, frame.need_reply, 0)
            return None
        refusal = self.limits.refusal(message) or self.table.refusal(message)
        if refusal is not None and frame.need_reply:
            self._acknowledge(message, True, refusal.status)
            return Refused(message, frame.fds, refusal)
        if refusal is not None:
            raise NeedReplyMissing(
                f"{request.name} is refused ({refusal.reason}) and nobody waits for the answer",
                field="request",
                value=int(request),
            )
        self._current = Call(message, frame.fds, frame.need_reply)
        return self._current

    def _negotiate(self, message: Message) -> bool:
        """Carries out what concerns the session alone. Returns false for what is the back end's."""
        match message:
            case m.GetFeatures():
                self._put(message, m.Value(F_PROTOCOL_FEATURES))
            case m.GetProtocolFeatures():
                self._put(message, m.Value(int(self.offered)))
            case m.SetProtocolFeatures(features):
                self._set_protocol_features(features)
            case m.SetFeatures(features):
                if features & ~F_PROTOCOL_FEATURES:
                    raise FeatureNotOffered(
                        "feature bits were set that are not offered",
                        field="features",
                        value=features,
                    )
            case m.SetOwner():
                pass
            case m.GetMaxMemSlots():
                self._put(message, m.Value(self.limits.mem_slots))
            case m.GetOffer():
                self._put(message, self.offer)
            case _:
                return False
        return True

    def _set_protocol_features(self, features: int) -> None:
        if features & ~int(self.offered):
            raise FeatureNotOffered(
                "protocol feature bits were set that are not offered",
                field="protocol_features",
                value=features,
            )
        check_required(features)
        self.protocol_features = ProtocolFeature(features)


def check_required(features: int) -> None:
    """Raises :class:`FeatureMissing`, naming the bits, unless all required ones are set."""
    missing = REQUIRED_FEATURES & ~ProtocolFeature(features)
    if missing:
        names = ", ".join(str(feature.name) for feature in missing)
        raise FeatureMissing(
            f"required protocol features are missing: {names}",
            field="protocol_features",
            value=features,
        )


class FrontEndSession(Session):
    """The hypervisor's end of a session, as the software guest has it.

    ``wanted_features`` are set if the back end offers them; the required ones always.
    """

    def __init__(self, wanted_features: ProtocolFeature = REQUIRED_FEATURES) -> None:
        super().__init__(Direction.REPLIES)
        self.wanted_features = wanted_features | REQUIRED_FEATURES
        self._unanswered: deque[Message] = deque()

    def send(self, message: Message, fd_count: int = 0) -> None:
        """Puts a request into :meth:`data_to_send`; its descriptors go with the first byte.

        Raises :class:`OutOfOrder`, or ``ValueError`` for a wrong number of descriptors.
        """
        if not message.check_fds(fd_count):
            raise ValueError(f"{type(message).__name__} does not carry {fd_count} descriptors")
        request = Request(message.REQUEST)
        self.state = next_state(self.state, request)
        if isinstance(message, m.SetProtocolFeatures):
            self.protocol_features = ProtocolFeature(message.features)
        feature = NEEDS_FEATURE.get(request)
        if feature is not None and feature not in self.protocol_features:
            raise FeatureMissing(
                f"{request.name} without {feature.name} set", field="request", value=int(request)
            )
        has_ack = ProtocolFeature.REPLY_ACK in self.protocol_features
        need_reply = request not in QUERIES and has_ack
        self._outgoing += encode(message, flags=NEED_REPLY if need_reply else 0)
        if need_reply or request in QUERIES:
            self._unanswered.append(message)

    def next_event(self) -> Reply | None:
        """Returns the answer to the oldest unanswered request, or ``None`` when more bytes are
        wanted.
        """
        try:
            frame = self._next_frame()
            if frame is None:
                return None
            if not self._unanswered or frame.request != self._unanswered[0].REQUEST:
                raise UnexpectedReply(
                    "a reply to a request that was not the oldest unanswered one",
                    field="request",
                    value=frame.request,
                )
            request = self._unanswered.popleft()
            assert isinstance(frame.message, m.Value | m.OfferReply | m.InflightReply)
            self._check(request, frame.message)
        except ProtocolError:
            self.state = State.CLOSED
            raise
        return Reply(request, frame.message, frame.fds)

    def _check(self, request: Message, reply: Message) -> None:
        if not isinstance(reply, m.Value):
            return
        if isinstance(request, m.GetFeatures) and not reply.value & F_PROTOCOL_FEATURES:
            raise FeatureMissing(
                "the back end does not offer VHOST_USER_F_PROTOCOL_FEATURES",
                field="features",
                value=reply.value,
            )
        if isinstance(request, m.GetProtocolFeatures):
            check_required(reply.value)
            self.wanted_features &= ProtocolFeature(reply.value)
