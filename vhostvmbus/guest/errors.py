# SPDX-License-Identifier: GPL-2.0-or-later
"""The errors that the software guest's user may meet.

``status`` is what KMCL's client endpoint returns for it.
"""

from __future__ import annotations

from vhostvmbus.wire.errors import VmbusError
from vhostvmbus.wire.ntstatus import NtStatus


class GuestSideError(VmbusError):
    """Base of this room's errors."""

    status: NtStatus = NtStatus.UNSUCCESSFUL


class SendRefused(GuestSideError):
    """The arguments of a send were refused before anything reached the ring."""

    def __init__(self, text: str, status: NtStatus = NtStatus.INVALID_PARAMETER) -> None:
        super().__init__(text)
        self.status = status


class RequestFailed(SendRefused):
    """A synchronous request has no answer; ``status`` says why."""


class Cancelled(GuestSideError):
    """The caller does not want to wait any more. The packet is still in flight."""

    status = NtStatus.CANCELLED


class CompletionTimeout(GuestSideError):
    """The host did not complete a packet in time.  The packet is still in flight."""

    status = NtStatus.IO_TIMEOUT


class ReceiveTimeout(GuestSideError):
    """The host sent nothing in time."""

    status = NtStatus.IO_TIMEOUT


class RingFullTimeout(GuestSideError):
    """The host did not make room in the ring in time.  Nothing was sent."""

    status = NtStatus.BUFFER_OVERFLOW


class HostBrokeRing(GuestSideError):
    """The ring cannot be followed beyond what the host put into it; the channel stops."""

    status = NtStatus.INVALID_DEVICE_STATE


class NoSuchDevice(GuestSideError):
    """The device at the socket is not the one that was asked for."""

    status = NtStatus.NO_SUCH_DEVICE


class NotOffered(GuestSideError):
    """The host does not offer this channel, or has rescinded it."""

    status = NtStatus.NO_SUCH_DEVICE


class OutOfPages(GuestSideError):
    """The allocator has no such pages left."""

    status = NtStatus.INSUFFICIENT_RESOURCES


class ChannelNotOpen(GuestSideError):
    """The channel was closed on this end."""

    status = NtStatus.DEVICE_REMOVED
