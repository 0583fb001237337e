# SPDX-License-Identifier: GPL-2.0-or-later
"""The standard messages that this protocol uses: QEMU's ``docs/interop/vhost-user.rst``."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Self

from vhostvmbus.vhost_user.errors import BadField, LimitExceeded, WrongSize
from vhostvmbus.vhost_user.message import (
    MAX_TABLE_REGIONS,
    Message,
    Request,
    check_reserved,
    front_end,
    split_records,
)


@front_end(Request.GET_FEATURES)
@dataclass(frozen=True, slots=True)
class GetFeatures(Message):
    """Asks for the feature bits."""


@front_end(Request.SET_FEATURES)
@dataclass(frozen=True, slots=True)
class SetFeatures(Message):
    """Sets the feature bits."""

    features: int
    LAYOUT = struct.Struct("<Q")


@front_end(Request.SET_OWNER)
@dataclass(frozen=True, slots=True)
class SetOwner(Message):
    """Says that the sender owns the session."""


@front_end(Request.GET_PROTOCOL_FEATURES)
@dataclass(frozen=True, slots=True)
class GetProtocolFeatures(Message):
    """Asks for the protocol feature bits."""


@front_end(Request.SET_PROTOCOL_FEATURES)
@dataclass(frozen=True, slots=True)
class SetProtocolFeatures(Message):
    """Sets the protocol feature bits."""

    features: int
    LAYOUT = struct.Struct("<Q")


@front_end(Request.SET_BACKEND_REQ_FD)
@dataclass(frozen=True, slots=True)
class SetBackendReqFd(Message):
    """Carries the socket of the back-end channel."""

    FDS = (1, 1)


@front_end(Request.GET_MAX_MEM_SLOTS)
@dataclass(frozen=True, slots=True)
class GetMaxMemSlots(Message):
    """Asks how many memory regions the back end can take."""


@dataclass(frozen=True, slots=True)
class _Inflight(Message):
    """The description of an in-flight region, 24 bytes; here ``num_queues`` are channels."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int
    LAYOUT = struct.Struct("<QQHHI")

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        *fields, reserved = cls.LAYOUT.unpack(payload)
        check_reserved(reserved)
        message = cls(*fields)
        if message.mmap_offset + message.mmap_size > 1 << 63:
            raise BadField(
                f"an in-flight region of {message.mmap_size:#x} bytes passes the end of any file",
                field="mmap_offset",
                value=message.mmap_offset,
            )
        return message

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size, 0
        )


@front_end(Request.GET_INFLIGHT_FD)
@dataclass(frozen=True, slots=True)
class GetInflightFd(_Inflight):
    """Asks for an in-flight region for ``num_queues`` channels; the rest is the back end's
    choice."""


@front_end(Request.SET_INFLIGHT_FD)
@dataclass(frozen=True, slots=True)
class SetInflightFd(_Inflight):
    """Gives the back end the region of one before, with its file."""

    FDS = (1, 1)


@dataclass(frozen=True, slots=True)
class InflightReply(_Inflight):
    """The region that was asked for, with its file; without one ``mmap_size`` is 0."""

    REQUEST = Request.GET_INFLIGHT_FD
    FDS = (0, 1)

    def check_fds(self, count: int) -> bool:
        return count == bool(self.mmap_size)


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A region of guest memory: addresses and sizes in bytes."""

    guest_phys_addr: int
    size: int
    user_addr: int
    mmap_offset: int
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQQQ")

    @classmethod
    def parse(cls, payload: bytes) -> MemoryRegion:
        """Reads one region. One that is empty, or passes 2**64, has no meaning."""
        region = cls(*cls.LAYOUT.unpack(payload))
        if region.size == 0:
            raise BadField("an empty memory region", field="size", value=0)
        if region.guest_phys_addr + region.size > 1 << 64:
            raise BadField(
                f"a memory region of {region.size:#x} bytes passes the end of the address space",
                field="guest_phys_addr",
                value=region.guest_phys_addr,
            )
        if region.mmap_offset + region.size > 1 << 63:
            raise BadField(
                f"a memory region of {region.size:#x} bytes passes the end of any file",
                field="mmap_offset",
                value=region.mmap_offset,
            )
        return region

    def pack(self) -> bytes:
        """Writes one region."""
        return self.LAYOUT.pack(self.guest_phys_addr, self.size, self.user_addr, self.mmap_offset)


@dataclass(frozen=True, slots=True)
class _OneRegion(Message):
    """The description of one memory region: 64 bits of padding, then the region."""

    region: MemoryRegion
    LAYOUT = struct.Struct("<8x32s")

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        return cls(MemoryRegion.parse(payload[8:]))

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.region.pack())


@front_end(Request.ADD_MEM_REG)
@dataclass(frozen=True, slots=True)
class AddMemReg(_OneRegion):
    """Adds a region of guest memory, with its fd."""

    FDS = (1, 1)


@front_end(Request.REM_MEM_REG)
@dataclass(frozen=True, slots=True)
class RemMemReg(_OneRegion):
    """Removes a region.

    The standard lets a back end accept one (useless) descriptor from old front ends.
    """

    FDS = (0, 1)


@front_end(Request.SET_MEM_TABLE)
@dataclass(frozen=True, slots=True)
class SetMemTable(Message):
    """Replaces the whole memory table; one fd for each region, in the same order."""

    regions: tuple[MemoryRegion, ...]
    LAYOUT = struct.Struct("<I4x")
    FDS = (0, MAX_TABLE_REGIONS)

    @classmethod
    def check_size(cls, size: int) -> None:
        rest = size - cls.LAYOUT.size
        if rest < 0 or rest % MemoryRegion.LAYOUT.size:
            raise WrongSize("SetMemTable has 8 + 32 n bytes", field="size", value=size)
        if rest // MemoryRegion.LAYOUT.size > MAX_TABLE_REGIONS:
            raise LimitExceeded(
                f"SetMemTable has at most {MAX_TABLE_REGIONS} regions", field="size", value=size
            )

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        (count,) = cls.LAYOUT.unpack_from(payload)
        regions = split_records(payload[cls.LAYOUT.size :], MemoryRegion.LAYOUT.size)
        if count != len(regions):
            raise BadField(
                f"{len(regions)} regions in the payload", field="num_regions", value=count
            )
        return cls(tuple(MemoryRegion.parse(region) for region in regions))

    def pack(self) -> bytes:
        head = self.LAYOUT.pack(len(self.regions))
        return head + b"".join(region.pack() for region in self.regions)

    def check_fds(self, count: int) -> bool:
        return count == len(self.regions)
