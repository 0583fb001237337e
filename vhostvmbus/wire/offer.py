# SPDX-License-Identifier: GPL-2.0-or-later
"""The offer of a device to the guest: docs/vhost-user-vmbus.md, *VMBUS_GET_OFFER*.

Floor 0: the only place that knows the offer's layout and its limits. A device host makes one, a
connection sends it, a front end reads it, all of them this value.
"""

import struct
from dataclasses import dataclass
from typing import ClassVar, Self
from uuid import UUID

from vhostvmbus.wire.guid import NULL_GUID, guid_from_wire, guid_to_wire
from vhostvmbus.wire.vmbus import USER_DATA_SIZE


class OfferInvalid(ValueError):
    """An offer with a field out of its range: ``field`` names it, ``value`` is what it held."""

    def __init__(self, message: str, field: str, value: object) -> None:
        super().__init__(message)
        self.field = field
        self.value = value


@dataclass(frozen=True, slots=True)
class Offer:
    """An offer; :exc:`OfferInvalid` names the field that is out of its range.

    ``instance_id`` ``None``, all zero on the wire, leaves the choice to the front end.
    ``mmio_megabytes`` is in MiB. ``user_defined`` is padded with zeros to 120 bytes.
    """

    class_id: UUID
    instance_id: UUID | None = None
    channel_flags: int = 0
    mmio_megabytes: int = 0
    channels: int = 1
    max_channels: int = 1
    user_defined: bytes = b""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct(f"<16s16sHHHH{USER_DATA_SIZE}s")

    def __post_init__(self) -> None:
        for name in ("channel_flags", "mmio_megabytes"):
            value = getattr(self, name)
            if not 0 <= value <= 0xFFFF:
                raise OfferInvalid(f"{name} {value} does not fit into 16 bits", name, value)
        if not 1 <= self.channels <= 0xFFFF:
            raise OfferInvalid(
                f"channels {self.channels} must be from 1 to 65535", "channels", self.channels
            )
        if not self.channels <= self.max_channels <= 0xFFFF:
            raise OfferInvalid(
                f"max_channels {self.max_channels} must be from channels to 65535",
                "max_channels",
                self.max_channels,
            )
        if len(self.user_defined) > USER_DATA_SIZE:
            raise OfferInvalid(
                f"user_defined has {len(self.user_defined)} bytes, at most {USER_DATA_SIZE}",
                "user_defined",
                self.user_defined,
            )
        # One way to write the same offer, so that two of them can be compared.
        object.__setattr__(self, "user_defined", self.user_defined.ljust(USER_DATA_SIZE, b"\0"))
        if self.instance_id == NULL_GUID:
            object.__setattr__(self, "instance_id", None)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads the 160 bytes of the reply. Raises :exc:`OfferInvalid`."""
        class_id, instance_id, *rest = cls.LAYOUT.unpack(data)
        return cls(guid_from_wire(class_id), guid_from_wire(instance_id), *rest)

    def pack(self) -> bytes:
        """Returns the 160 bytes of the reply; GUIDs in VMBus's wire order."""
        return self.LAYOUT.pack(
            guid_to_wire(self.class_id),
            guid_to_wire(self.instance_id),
            self.channel_flags,
            self.mmio_megabytes,
            self.channels,
            self.max_channels,
            self.user_defined,
        )
