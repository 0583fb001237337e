# SPDX-License-Identifier: GPL-2.0-or-later
"""The mistakes that a peer on the socket can make, one class for each.

All of them end the session: a peer that breaks the framing, the order or the limits of
``docs/vhost-user-vmbus.md`` cannot be followed any further. What a well-behaved front end may ask
for and be refused (an unknown GPADL, a second opening of a channel) is not here: that is a status
in the acknowledgement.
"""

from __future__ import annotations

from vhostvmbus.wire.errors import FrontEndError, VmbusError


class ProtocolError(FrontEndError):
    """The base of this room's errors.

    ``field`` names what was wrong and ``value`` is what it held; both are part of the text, so that
    a log line is enough to find the mistake.
    """

    def __init__(self, text: str, *, field: str, value: object) -> None:
        shown = f"{value:#x}" if isinstance(value, int) and value > 9 else repr(value)
        super().__init__(f"{text} ({field} = {shown})")
        self.field = field
        self.value = value


class BadVersion(ProtocolError):
    """The version bits of a header's flags are not 1."""


class BadFlags(ProtocolError):
    """A header has undefined flag bits, or the reply bit the wrong way round."""


class UnknownRequest(ProtocolError):
    """A request number that this side of the protocol does not have."""


class Oversized(ProtocolError):
    """A payload longer than 4096 bytes."""


class WrongSize(ProtocolError):
    """A payload whose size is not the one of its message."""


class Truncated(ProtocolError):
    """The connection ended inside a message."""


class WrongFds(ProtocolError):
    """Too many or too few descriptors, or descriptors away from a header's first byte."""


class WrongFdType(ProtocolError):
    """A descriptor of another kind than the message carries (no eventfd, no socket, ...)."""


class BadField(ProtocolError):
    """A field with a value outside what the protocol gives a meaning to."""


class OutOfOrder(ProtocolError):
    """A message that has no place in the present state of the session."""


class FeatureNotOffered(ProtocolError):
    """The peer set a feature bit that was not offered."""


class FeatureMissing(ProtocolError):
    """A required feature bit is missing, or a message came whose feature was not set."""


class NeedReplyMissing(ProtocolError):
    """A request that must be sent with need-reply came without it."""


class LimitExceeded(ProtocolError):
    """More of something than the protocol or this back end allows."""


class UnexpectedReply(ProtocolError):
    """A reply that does not belong to the oldest unanswered request."""


class OfferChanged(ProtocolError):
    """A back end came back after a reconnection with another offer."""


class Disconnected(VmbusError):
    """The peer closed the connection between two messages, or went away."""


class BackChannelTimeout(VmbusError):
    """The front end did not answer a back-end request in time."""


class RequestRefused(VmbusError):
    """The peer answered a request with a non-zero status.

    ``status`` is the 32-bit NTSTATUS in the acknowledgement.
    """

    def __init__(self, request: str, status: int) -> None:
        super().__init__(f"{request} was refused with status {status:#010x}")
        self.request = request
        self.status = status


class SocketInUse(VmbusError):
    """Another live process listens on the socket path."""


class NotASocket(VmbusError):
    """Something that is not a socket lies at the socket path."""
