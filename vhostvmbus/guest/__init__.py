# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest: the opposite endpoint of a device, so that one is driven without a VM.

:class:`SoftwareGuest` is the front end and the guest in one; :class:`GuestChannel` its half of a
channel; :class:`GuestRam` its memory; :class:`HostileChannel` for a guest that lies.
"""

from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.code_map import GuestCodeMap
from vhostvmbus.guest.errors import (
    Cancelled,
    ChannelNotOpen,
    CompletionTimeout,
    GuestSideError,
    HostBrokeRing,
    NoSuchDevice,
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
from vhostvmbus.guest.trial import Exchange, Trial, try_channel

__all__ = [
    "Cancelled",
    "ChannelNotOpen",
    "CompletionTimeout",
    "Exchange",
    "FrontEnd",
    "GuestChannel",
    "GuestCodeMap",
    "GuestGpadl",
    "GuestRam",
    "GuestSideError",
    "HostBrokeRing",
    "HostPacket",
    "HostileChannel",
    "NoSuchDevice",
    "OutOfPages",
    "RamRegion",
    "RawRing",
    "ReceiveTimeout",
    "RequestFailed",
    "RingFullTimeout",
    "SendRefused",
    "SoftwareGuest",
    "Transaction",
    "Trial",
    "connect_socket",
    "serving",
    "try_channel",
]
