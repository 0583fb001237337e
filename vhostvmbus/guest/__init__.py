# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest: the opposite endpoint of a device, so that one is driven without a VM.

:class:`SoftwareGuest` is the front end and the guest in one; :class:`GuestChannel` its half of a
channel; :class:`GuestRam` its memory; :class:`HostileChannel` for a guest that lies. All that a
device's tests need comes from here; docs/writing-a-device.md has a line for each name.
"""

from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.code_map import GuestCodeMap
from vhostvmbus.guest.direct import DirectFrontEnd
from vhostvmbus.guest.errors import (
    Cancelled,
    ChannelNotOpen,
    CompletionTimeout,
    GuestSideError,
    HostBrokeRing,
    NoSuchDevice,
    NotOffered,
    OutOfPages,
    ReceiveTimeout,
    RequestFailed,
    RingFullTimeout,
    SendRefused,
)
from vhostvmbus.guest.front_end import FrontEnd
from vhostvmbus.guest.gpadl import GuestGpadl
from vhostvmbus.guest.hostile import HostileChannel, RawRing
from vhostvmbus.guest.ram import GuestRam, RamRegion
from vhostvmbus.guest.serving import connect_socket, serving
from vhostvmbus.guest.software_guest import SoftwareGuest
from vhostvmbus.guest.transactions import HostPacket, Transaction
from vhostvmbus.guest.transport import Transport
from vhostvmbus.guest.trial import Exchange, Trial, try_channel
from vhostvmbus.vhost_user.errors import Disconnected, OfferChanged, RequestRefused
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.vmbus import PAGE_SIZE, PacketType

__all__ = [
    "PAGE_SIZE",
    "Cancelled",
    "ChannelNotOpen",
    "CompletionTimeout",
    "DirectFrontEnd",
    "Disconnected",
    "Exchange",
    "FrontEnd",
    "GpaRange",
    "GuestChannel",
    "GuestCodeMap",
    "GuestGpadl",
    "GuestRam",
    "GuestSideError",
    "HostBrokeRing",
    "HostPacket",
    "HostileChannel",
    "NoSuchDevice",
    "NotOffered",
    "NtStatus",
    "OfferChanged",
    "OutOfPages",
    "PacketType",
    "RamRegion",
    "RawRing",
    "ReceiveTimeout",
    "RequestFailed",
    "RequestRefused",
    "RingFullTimeout",
    "SendRefused",
    "SoftwareGuest",
    "Transaction",
    "Transport",
    "Trial",
    "connect_socket",
    "serving",
    "try_channel",
]
