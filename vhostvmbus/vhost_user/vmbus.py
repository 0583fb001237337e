# SPDX-License-Identifier: GPL-2.0-or-later
"""The VMBus messages: ``docs/vhost-user-vmbus.md``, "Front-end requests" and on."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from vhostvmbus.vhost_user.errors import BadField, LimitExceeded, WrongSize
from vhostvmbus.vhost_user.message import (
    MAX_INVALIDATE_RANGES,
    OPEN_RESUME,
    BackendRequest,
    ChannelMessage,
    Message,
    Request,
    back_end,
    check_reserved,
    front_end,
    split_records,
)
from vhostvmbus.wire.offer import Offer, OfferInvalid
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import MAX_REGIONS, lies_in_code_map
from vhostvmbus.wire.vmbus import USER_DATA_SIZE


@front_end(Request.VMBUS_GET_OFFER)
@dataclass(frozen=True, slots=True)
class GetOffer(Message):
    """Asks what the device offers."""


@front_end(Request.VMBUS_GPADL_CREATE)
@dataclass(frozen=True, slots=True)
class GpadlCreate(Message):
    """Gives ``range_count`` GPA ranges, ``range_bytes`` in all, in a sealed memfd."""

    channel: int
    gpadl_id: int
    range_count: int
    range_bytes: int
    LAYOUT = struct.Struct("<IIII")
    FDS = (1, 1)

    MIN_RANGE_BYTES: ClassVar[int] = 16
    """The fewest bytes of a range: its two counts and one PFN."""

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        message = cls(*cls.LAYOUT.unpack(payload))
        if message.range_count == 0:
            raise BadField("a GPADL without ranges", field="range_count", value=0)
        if message.range_bytes % 8 or message.range_bytes // cls.MIN_RANGE_BYTES < (
            message.range_count
        ):
            raise BadField(
                f"{message.range_count} GPA ranges do not have this many bytes",
                field="range_bytes",
                value=message.range_bytes,
            )
        return message


@front_end(Request.VMBUS_GPADL_TEARDOWN)
@dataclass(frozen=True, slots=True)
class GpadlTeardown(Message):
    """Tears a GPADL down."""

    channel: int
    gpadl_id: int
    LAYOUT = struct.Struct("<II")


@front_end(Request.VMBUS_OPEN)
@dataclass(frozen=True, slots=True)
class Open(Message):
    """Opens a channel; carries the kick and the call eventfd, in this order."""

    opening: Opening
    LAYOUT = struct.Struct(f"<IIIIII{USER_DATA_SIZE}s")
    FDS = (2, 2)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        index, gpadl, ring_offset, vp, version, flags, user_data = cls.LAYOUT.unpack(payload)
        if flags & ~OPEN_RESUME:
            raise BadField("undefined flags of VMBUS_OPEN", field="flags", value=flags)
        resumed = bool(flags & OPEN_RESUME)
        return cls(Opening(index, gpadl, ring_offset, vp, version, user_data, resumed))

    def pack(self) -> bytes:
        opening = self.opening
        return self.LAYOUT.pack(
            opening.index,
            opening.gpadl_id,
            opening.ring_offset,
            opening.target_vp,
            opening.version,
            OPEN_RESUME if opening.resumed else 0,
            opening.user_data,
        )


@front_end(Request.VMBUS_CLOSE)
@dataclass(frozen=True, slots=True)
class Close(ChannelMessage):
    """Closes a channel."""


@front_end(Request.VMBUS_MODIFY)
@dataclass(frozen=True, slots=True)
class Modify(Message):
    """Says that the guest moved the channel's interrupt to another virtual processor."""

    channel: int
    target_vp: int
    LAYOUT = struct.Struct("<II")


@front_end(Request.VMBUS_RESET)
@dataclass(frozen=True, slots=True)
class Reset(Message):
    """Closes every channel and forgets every GPADL."""


@dataclass(frozen=True, slots=True)
class CodeMapRegion:
    """The place of a region's bits in the code map."""

    guest_phys_addr: int
    size: int
    first_bit: int
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQQ")


@front_end(Request.VMBUS_SET_CODE_MAP)
@dataclass(frozen=True, slots=True)
class SetCodeMap(Message):
    """Gives the bitmap of translated pages ("Translated code"), in a memfd of ``map_bytes``."""

    map_bytes: int
    regions: tuple[CodeMapRegion, ...]
    LAYOUT = struct.Struct("<QII")
    FDS = (1, 1)

    @classmethod
    def check_size(cls, size: int) -> None:
        rest = size - cls.LAYOUT.size
        if rest < 0 or rest % CodeMapRegion.LAYOUT.size:
            raise WrongSize("SetCodeMap has 16 + 24 n bytes", field="size", value=size)
        if rest // CodeMapRegion.LAYOUT.size > MAX_REGIONS:
            raise LimitExceeded(
                f"SetCodeMap has at most {MAX_REGIONS} regions", field="size", value=size
            )

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        map_bytes, count, reserved = cls.LAYOUT.unpack_from(payload)
        check_reserved(reserved)
        records = split_records(payload[cls.LAYOUT.size :], CodeMapRegion.LAYOUT.size)
        if count != len(records):
            raise BadField(
                f"{len(records)} regions in the payload", field="region_count", value=count
            )
        regions = tuple(CodeMapRegion(*CodeMapRegion.LAYOUT.unpack(r)) for r in records)
        for region in regions:
            _check_code_map_region(region, map_bytes)
        return cls(map_bytes, regions)

    def pack(self) -> bytes:
        head = self.LAYOUT.pack(self.map_bytes, len(self.regions), 0)
        return head + b"".join(
            CodeMapRegion.LAYOUT.pack(r.guest_phys_addr, r.size, r.first_bit) for r in self.regions
        )


def _check_code_map_region(region: CodeMapRegion, map_bytes: int) -> None:
    if region.size == 0 or region.guest_phys_addr + region.size > 1 << 64:
        raise BadField(
            f"a code map region at {region.guest_phys_addr:#x} is empty or passes 2**64",
            field="size",
            value=region.size,
        )
    if not lies_in_code_map(region.size, region.first_bit, map_bytes):
        raise BadField(
            f"the bits of {region.size} bytes do not lie in a map of {map_bytes} bytes",
            field="first_bit",
            value=region.first_bit,
        )


@front_end(Request.VMBUS_SUSPEND)
@dataclass(frozen=True, slots=True)
class Suspend(Message):
    """Says that the machine stands still: every open channel is to."""


@front_end(Request.VMBUS_CONTINUE)
@dataclass(frozen=True, slots=True)
class Continue(Message):
    """Says that the machine goes on, and with it the channels that stand still."""


@front_end(Request.VMBUS_UNPLUG)
@dataclass(frozen=True, slots=True)
class Unplug(Message):
    """Says that the device is about to be taken from the guest."""


@dataclass(frozen=True, slots=True)
class OfferReply(Message):
    """Says what the device offers, in answer to ``VMBUS_GET_OFFER``."""

    offer: Offer
    REQUEST = Request.VMBUS_GET_OFFER
    LAYOUT = Offer.LAYOUT

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        try:
            return cls(Offer.parse(payload))
        except OfferInvalid as error:
            raise BadField(str(error), field=error.field, value=error.value) from error

    def pack(self) -> bytes:
        return self.offer.pack()


@back_end(BackendRequest.VMBUS_BACKEND_INVALIDATE_CODE)
@dataclass(frozen=True, slots=True)
class InvalidateCode(Message):
    """Has all translations from these ``(guest_phys_addr, size)`` ranges discarded."""

    ranges: tuple[tuple[int, int], ...]
    LAYOUT = struct.Struct("<II")
    RANGE: ClassVar[struct.Struct] = struct.Struct("<QQ")

    @classmethod
    def check_size(cls, size: int) -> None:
        rest = size - cls.LAYOUT.size
        if rest < 0 or rest % cls.RANGE.size:
            raise WrongSize("InvalidateCode has 8 + 16 n bytes", field="size", value=size)
        if rest // cls.RANGE.size > MAX_INVALIDATE_RANGES:
            raise LimitExceeded(
                f"InvalidateCode has at most {MAX_INVALIDATE_RANGES} ranges",
                field="size",
                value=size,
            )

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        count, reserved = cls.LAYOUT.unpack_from(payload)
        check_reserved(reserved)
        ranges = tuple(cls.RANGE.iter_unpack(payload[cls.LAYOUT.size :]))
        if count != len(ranges):
            raise BadField(f"{len(ranges)} ranges in the payload", field="count", value=count)
        return cls(tuple((address, size) for address, size in ranges))

    def pack(self) -> bytes:
        if len(self.ranges) > MAX_INVALIDATE_RANGES:
            raise LimitExceeded(
                f"InvalidateCode has at most {MAX_INVALIDATE_RANGES} ranges",
                field="count",
                value=len(self.ranges),
            )
        head = self.LAYOUT.pack(len(self.ranges), 0)
        return head + b"".join(self.RANGE.pack(*r) for r in self.ranges)


@back_end(BackendRequest.VMBUS_BACKEND_OFFER_CHANNEL)
@dataclass(frozen=True, slots=True)
class OfferChannel(ChannelMessage):
    """Offers a subchannel to the guest."""


@back_end(BackendRequest.VMBUS_BACKEND_RESCIND_CHANNEL)
@dataclass(frozen=True, slots=True)
class RescindChannel(ChannelMessage):
    """Rescinds a subchannel; channel 0 means the whole device."""
