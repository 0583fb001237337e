# SPDX-License-Identifier: GPL-2.0-or-later
"""What a device offers to the guest: the reply to VMBUS_GET_OFFER (docs/vhost-user-vmbus.md)."""

import struct
from dataclasses import dataclass
from uuid import UUID

from vhostvmbus.wire.guid import guid_to_wire
from vhostvmbus.wire.vmbus import CHANNEL_FLAGS_MASK, USER_DEFINED_SIZE

_OFFER = struct.Struct("<16s16sHHHH120s")


@dataclass(frozen=True, slots=True)
class Offer:
    """An offer; :exc:`ValueError` names the field that is out of its range.

    ``instance_id`` ``None`` leaves the choice to the front end. ``mmio_megabytes`` is in MiB.
    """

    class_id: UUID
    instance_id: UUID | None = None
    channel_flags: int = 0
    mmio_megabytes: int = 0
    channels: int = 1
    max_channels: int = 1
    user_defined: bytes = b""

    def __post_init__(self) -> None:
        if self.channel_flags & ~CHANNEL_FLAGS_MASK:
            unknown = self.channel_flags & ~CHANNEL_FLAGS_MASK
            raise ValueError(f"channel_flags has unknown bits {unknown:#x}")
        if not 0 <= self.mmio_megabytes <= 0xFFFF:
            raise ValueError(f"mmio_megabytes {self.mmio_megabytes} does not fit into 16 bits")
        if not 1 <= self.channels <= 0xFFFF:
            raise ValueError(f"channels {self.channels} must be from 1 to 65535")
        if not self.channels <= self.max_channels <= 0xFFFF:
            raise ValueError(f"max_channels {self.max_channels} must be from channels to 65535")
        if len(self.user_defined) > USER_DEFINED_SIZE:
            raise ValueError(f"user_defined has {len(self.user_defined)} bytes, at most 120")

    def pack(self) -> bytes:
        """The 160 bytes of the reply; GUIDs in VMBus's wire order."""
        return _OFFER.pack(
            guid_to_wire(self.class_id),
            guid_to_wire(self.instance_id),
            self.channel_flags,
            self.mmio_megabytes,
            self.channels,
            self.max_channels,
            self.user_defined,
        )
