# SPDX-License-Identifier: GPL-2.0-or-later
"""The common part of all messages: numbers, feature bits, limits, and the base class.

Everything is little-endian and without padding. A class knows its payload's layout and how many
descriptors travel with it; it does no I/O. ``parse`` takes a payload whose size has already been
checked with :meth:`Message.check_size` and raises
:class:`~vhostvmbus.vhost_user.errors.ProtocolError` for field values that have no meaning.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self, TypeVar

from vhostvmbus.vhost_user.errors import BadField, WrongSize

MAX_PAYLOAD = 4096
"""The longest payload of any message, in bytes ("Message header")."""

F_PROTOCOL_FEATURES = 1 << 30
"""The standard's ``VHOST_USER_F_PROTOCOL_FEATURES``: there are protocol features to negotiate."""

MAX_TABLE_REGIONS = 8
"""The most regions in one ``SET_MEM_TABLE`` (``VHOST_MEMORY_BASELINE_NREGIONS``)."""
MAX_INVALIDATE_RANGES = 200
"""The most ranges in one ``VMBUS_BACKEND_INVALIDATE_CODE``."""
OPEN_RESUME = 1
"""A flag of ``VMBUS_OPEN``: the guest has had the channel open all along."""


class ProtocolFeature(enum.IntFlag):
    """Protocol feature bits ("Negotiation")."""

    LOG_SHMFD = 1 << 1
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    BACKEND_SEND_FD = 1 << 10
    INFLIGHT_SHMFD = 1 << 12
    CONFIGURE_MEM_SLOTS = 1 << 15
    DEVICE_STATE = 1 << 19
    VMBUS = 1 << 48
    VMBUS_CODE_MAP = 1 << 49
    VMBUS_UNPLUG = 1 << 50
    VMBUS_SUSPEND = 1 << 51


REQUIRED_FEATURES = (
    ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.VMBUS
)
"""The features that no session can do without."""


class Request(enum.IntEnum):
    """Front-end requests."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    SET_MEM_TABLE = 5
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    SET_BACKEND_REQ_FD = 21
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    VMBUS_GET_OFFER = 1024
    VMBUS_GPADL_CREATE = 1025
    VMBUS_GPADL_TEARDOWN = 1026
    VMBUS_OPEN = 1027
    VMBUS_CLOSE = 1028
    VMBUS_MODIFY = 1029
    VMBUS_RESET = 1030
    VMBUS_SET_CODE_MAP = 1031
    VMBUS_UNPLUG = 1032
    VMBUS_SUSPEND = 1033
    VMBUS_CONTINUE = 1034


class BackendRequest(enum.IntEnum):
    """Back-end requests, on the socket passed with ``SET_BACKEND_REQ_FD``."""

    VMBUS_BACKEND_INVALIDATE_CODE = 1024
    VMBUS_BACKEND_OFFER_CHANNEL = 1025
    VMBUS_BACKEND_RESCIND_CHANNEL = 1026


@dataclass(frozen=True, slots=True)
class Message:
    """A message: its fields, their layout and the descriptors that travel with it."""

    REQUEST: ClassVar[int]
    """The number in the header; a reply carries the number of its request."""
    LAYOUT: ClassVar[struct.Struct] = struct.Struct("")
    """The fixed part of the payload, in the order of the dataclass's fields."""
    FDS: ClassVar[tuple[int, int]] = (0, 0)
    """The fewest and the most descriptors that travel with the message."""

    @classmethod
    def check_size(cls, size: int) -> None:
        """Raises :class:`WrongSize` unless a payload of ``size`` bytes can be this message."""
        if size != cls.LAYOUT.size:
            raise WrongSize(f"{cls.__name__} has {cls.LAYOUT.size} bytes", field="size", value=size)

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Reads the payload (bytes → fields)."""
        return cls(*cls.LAYOUT.unpack(payload))

    def pack(self) -> bytes:
        """Writes the payload (fields → bytes)."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return self.LAYOUT.pack(*values)

    def check_fds(self, count: int) -> bool:
        """Tells whether ``count`` descriptors are what this very message carries."""
        return self.FDS[0] <= count <= self.FDS[1]


M = TypeVar("M", bound=type[Message])
FRONT_END_REQUESTS: dict[int, type[Message]] = {}
BACK_END_REQUESTS: dict[int, type[Message]] = {}


def front_end(request: Request) -> Callable[[M], M]:
    """Registers a front-end request."""

    def register(cls: M) -> M:
        cls.REQUEST = request
        FRONT_END_REQUESTS[request] = cls
        return cls

    return register


def back_end(request: BackendRequest) -> Callable[[M], M]:
    """Registers a back-end request."""

    def register(cls: M) -> M:
        cls.REQUEST = request
        BACK_END_REQUESTS[request] = cls
        return cls

    return register


def check_reserved(value: int) -> None:
    """Checks that a reserved field is zero, so that it can be given a meaning later."""
    if value:
        raise BadField("a reserved field is not zero", field="reserved", value=value)


def split_records(data: bytes, size: int) -> list[bytes]:
    """Returns ``data`` cut into records of ``size`` bytes."""
    return [data[at : at + size] for at in range(0, len(data), size)]


@dataclass(frozen=True, slots=True)
class ChannelMessage(Message):
    """A payload of ``channel u32, reserved u32``."""

    channel: int
    LAYOUT = struct.Struct("<II")

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Reads the channel."""
        channel, reserved = cls.LAYOUT.unpack(payload)
        check_reserved(reserved)
        return cls(channel)

    def pack(self) -> bytes:
        """Writes the channel."""
        return self.LAYOUT.pack(self.channel, 0)


@dataclass(frozen=True, slots=True)
class Value(Message):
    """A ``u64`` reply: feature bits, a number of slots, or the status of an acknowledgement."""

    value: int
    LAYOUT = struct.Struct("<Q")
