# SPDX-License-Identifier: GPL-2.0-or-later
"""Constants and packet descriptors of VMBus rings.

Source: the guest's ``include/linux/hyperv.h`` (``struct hv_ring_buffer``, ``struct
vmpacket_descriptor``, ``enum vmbus_packet_type``), whose names are kept.

A packet in a ring is: a 16-byte descriptor, a type-specific header up to ``offset8 * 8``, the
payload up to ``len8 * 8``, and an 8-byte trailer that is not counted in ``len8``.
"""

import struct
from enum import IntEnum
from typing import NamedTuple

PAGE_SIZE = 4096

RING_HEADER_SIZE = PAGE_SIZE
"""The control page in front of a ring's data, in bytes."""
RING_WRITE_INDEX = 0
RING_READ_INDEX = 4
RING_INTERRUPT_MASK = 8
RING_PENDING_SEND_SZ = 12
RING_FEATURE_BITS = 64

DESCRIPTOR_SIZE = 16
TRAILER_SIZE = 8
GPA_DIRECT_HEADER_SIZE = 24
"""Descriptor plus ``reserved u32, range_count u32``."""

COMPLETION_REQUESTED = 1
"""``VMBUS_DATA_PACKET_FLAG_COMPLETION_REQUESTED``."""

USER_DATA_SIZE = 120
"""``MAX_USER_DEFINED_BYTES``: of the class in an offer, of the driver in an open message."""


class PacketType(IntEnum):
    """``enum vmbus_packet_type``."""

    INVALID = 0x0
    SYNCH = 0x1
    ADD_XFER_PAGESET = 0x2
    RM_XFER_PAGESET = 0x3
    ESTABLISH_GPADL = 0x4
    TEARDOWN_GPADL = 0x5
    DATA_INBAND = 0x6
    DATA_USING_XFER_PAGES = 0x7
    DATA_USING_GPADL = 0x8
    DATA_USING_GPA_DIRECT = 0x9
    CANCEL_REQUEST = 0xA
    COMP = 0xB
    DATA_USING_ADDITIONAL_PKT = 0xC
    ADDITIONAL_DATA = 0xD


class ChannelFlag(IntEnum):
    """Bits of ``chn_flags`` in an offer (``VMBUS_CHANNEL_*`` of ``hyperv.h``)."""

    ENUMERATE_DEVICE_INTERFACE = 0x1
    SERVER_SUPPORTS_TRANSFER_PAGES = 0x2
    SERVER_SUPPORTS_GPADLS = 0x4
    NAMED_PIPE_MODE = 0x10
    LOOPBACK_OFFER = 0x100
    PARENT_OFFER = 0x200
    REQUEST_MONITORED_NOTIFICATION = 0x400
    TLNPI_PROVIDER_OFFER = 0x2000


CHANNEL_FLAGS_MASK = 0x2717
"""Every channel flag that has a meaning."""


class Descriptor(NamedTuple):
    """A packet descriptor: ``type u16, offset8 u16, len8 u16, flags u16, transaction_id u64``."""

    type: int
    offset8: int
    len8: int
    flags: int
    transaction_id: int


_DESCRIPTOR = struct.Struct("<HHHHQ")


def pack_descriptor(descriptor: Descriptor) -> bytes:
    """Returns the 16 wire bytes of ``descriptor``. It checks nothing, so that tests can lie."""
    return _DESCRIPTOR.pack(*descriptor)


def align8(length: int) -> int:
    """Returns ``length`` rounded up to the ring's 8-byte granularity."""
    return (length + 7) & ~7


def vmbus_version(major: int, minor: int) -> int:
    """Returns a protocol version as on the wire: major in the high 16 bits, minor in the low."""
    return major << 16 | minor
