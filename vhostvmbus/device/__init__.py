# SPDX-License-Identifier: GPL-2.0-or-later
"""The device author's API, and the driver of a device. All that a device needs comes from here.

A device is a subclass of :class:`Device`: class attributes describe it, callbacks do its work.
docs/writing-a-device.md says how, and has a line for each name. :class:`DeviceHost` owns a device's
channels and the guest's memory; sockets are the business of ``vhost_user.server``.
"""

from vhostvmbus.channel import Channel, ChannelState, ChannelStats, Packet
from vhostvmbus.device.device import Device
from vhostvmbus.device.host import DeviceHost
from vhostvmbus.device.quiet import GuestClock, wait_until_quiet
from vhostvmbus.memory import CodeMap, ExternalData
from vhostvmbus.ring import AnyPlan, Number, Operation, Plan, RingState, Rule
from vhostvmbus.ring.plan import PLAN_BYTES
from vhostvmbus.wire.errors import (
    AlreadyCompleted,
    ChannelClosed,
    CompletionUnexpected,
    DeviceTimeout,
    ExternalDataClosed,
    ExternalDataReadOnly,
    FrontEndError,
    GpadlUnknown,
    GpaRangeCountInvalid,
    GpaRangeEmpty,
    GpaRangeError,
    GpaRangeTooLong,
    GpaRangeTruncated,
    GuestError,
    GuestMemoryLost,
    OfferRefused,
    PacketError,
    PacketReplayedTooOften,
    PacketTooBig,
    PacketTooLarge,
    PacketTypeUnexpected,
    PfnOutsideMemory,
    RefuseOpen,
    RequestCancelled,
    RingFull,
    SendQueueFull,
    UsageError,
    VmbusError,
)
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.transfer import build_transfer_pages
from vhostvmbus.wire.vmbus import PAGE_SIZE, ChannelFlag, PacketType

__all__ = [
    "PAGE_SIZE",
    "PLAN_BYTES",
    "AlreadyCompleted",
    "AnyPlan",
    "Channel",
    "ChannelClosed",
    "ChannelFlag",
    "ChannelState",
    "ChannelStats",
    "CodeMap",
    "CompletionUnexpected",
    "Device",
    "DeviceHost",
    "DeviceTimeout",
    "ExternalData",
    "ExternalDataClosed",
    "ExternalDataReadOnly",
    "FrontEndError",
    "GpaRange",
    "GpaRangeCountInvalid",
    "GpaRangeEmpty",
    "GpaRangeError",
    "GpaRangeTooLong",
    "GpaRangeTruncated",
    "GpadlUnknown",
    "GuestClock",
    "GuestError",
    "GuestMemoryLost",
    "NtStatus",
    "Number",
    "Offer",
    "OfferRefused",
    "Operation",
    "Packet",
    "PacketError",
    "PacketReplayedTooOften",
    "PacketTooBig",
    "PacketTooLarge",
    "PacketType",
    "PacketTypeUnexpected",
    "PfnOutsideMemory",
    "Plan",
    "RefuseOpen",
    "RequestCancelled",
    "RingFull",
    "RingState",
    "Rule",
    "SendQueueFull",
    "UsageError",
    "VmbusError",
    "build_transfer_pages",
    "wait_until_quiet",
]
