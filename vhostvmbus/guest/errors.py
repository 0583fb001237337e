# SPDX-License-Identifier: GPL-2.0-or-later
"""What can go wrong for the software guest's user."""

from __future__ import annotations

from vhostvmbus.wire.errors import VmbusError
from vhostvmbus.wire.ntstatus import NtStatus


class GuestSideError(VmbusError):
    """Base of this room's errors."""


class SendRefused(GuestSideError):
    """The arguments of a send are refused before anything reaches the ring.

    ``status`` is what KMCL's client endpoint returns for it.
    """

    def __init__(self, text: str, status: NtStatus = NtStatus.INVALID_PARAMETER) -> None:
        super().__init__(text)
        self.status = status


class CompletionTimeout(GuestSideError):
    """The host did not complete a packet in time.  The packet is still in flight."""


class ReceiveTimeout(GuestSideError):
    """The host sent nothing in time."""


class RingFullTimeout(GuestSideError):
    """The host did not make room in the ring in time.  Nothing was sent."""


class HostBrokeRing(GuestSideError):
    """What the host put into the ring cannot be followed; the channel stops."""


class OutOfPages(GuestSideError):
    """The allocator has no such pages left."""


class ChannelNotOpen(GuestSideError):
    """The channel was closed on this end."""
