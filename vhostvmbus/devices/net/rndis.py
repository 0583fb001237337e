# SPDX-License-Identifier: GPL-2.0-or-later
"""Remote NDIS: the messages inside NVSP's RNDIS packets, bytes only.

Layouts: [MS-RNDIS] 2.2; Linux ``hyperv_net.h``, ``struct rndis_message``. Little-endian. A message
is ``type u32, length u32`` and a body; the length counts the whole message. Offsets in a body count
from the body's start, which is 8 bytes into the message.

Invariants: decoding raises nothing but :class:`RndisError`; what a decoded message points to lies
inside of it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from vhostvmbus.devices.net.errors import RndisError
from vhostvmbus.engine import lib

HEADER_SIZE: Final[int] = lib.VVB_NET_RNDIS_HEADER_SIZE
MAX_CONTROL_SIZE: Final = 8192
"""The longest control message taken, in bytes. Linux has 4 KiB for what an OID says."""
MAX_PACKETS_PER_MESSAGE: Final[int] = lib.VVB_NET_RNDIS_MESSAGES
"""The most frames in one packet of the guest, announced in INITIALIZE_COMPLETE."""
ALIGNMENT_SHIFT: Final = 3
"""The alignment of packets in one section, 2 to this power: 8 bytes. It is announced likewise."""
MAJOR_VERSION: Final = 1
CONNECTIONLESS: Final = 1
MEDIUM_802_3: Final = 0

COMPLETION: Final = 0x80000000
"""The flag in a type that makes it the completion of that request."""


class MessageType(IntEnum):
    """The values of ``ndis_msg_type``."""

    PACKET = lib.VVB_NET_RNDIS_PACKET
    """A frame: ``native/messages.c`` reads it."""
    INITIALIZE = 2
    HALT = 3
    QUERY = 4
    SET = 5
    RESET = 6
    INDICATE_STATUS = 7
    KEEPALIVE = 8


@dataclass(frozen=True, slots=True)
class Initialize:
    """The guest's first message."""

    request_id: int
    major: int
    minor: int
    max_transfer_size: int


@dataclass(frozen=True, slots=True)
class Halt:
    """The guest's last message. It has no completion."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Query:
    """Asks for the value of ``oid``. Some OIDs take information with the question."""

    request_id: int
    oid: int
    information: bytes


@dataclass(frozen=True, slots=True)
class Set:
    """Says that the value of ``oid`` shall be ``information``."""

    request_id: int
    oid: int
    information: bytes


@dataclass(frozen=True, slots=True)
class Reset:
    """Has the card forget what was set."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Asks whether the card is alive."""

    request_id: int


Control = Initialize | Halt | Query | Set | Reset | Keepalive

_HEADER = struct.Struct("<II")
_INITIALIZE = struct.Struct("<8xIIII")
_U32 = struct.Struct("<8xI")
_OID = struct.Struct("<8xIIII")
"""Without the reserved word behind it, which a driver may leave out."""


def decode_control(data: bytes) -> Control:
    """Returns the message at the start of ``data``, private memory; what is behind it is ignored.

    Raises :class:`RndisError`.
    """
    kind, length = _header(data, len(data))
    match kind:
        case MessageType.INITIALIZE:
            return Initialize(*_body(_INITIALIZE, data, length))
        case MessageType.HALT:
            return Halt(*_body(_U32, data, length))
        case MessageType.QUERY | MessageType.SET:
            request_id, oid, size, offset = _body(_OID, data, length)
            information = b""
            if size:
                if offset < _OID.size - HEADER_SIZE or offset > length - HEADER_SIZE:
                    raise RndisError("info_buf_offset", offset, 20)
                if size > length - HEADER_SIZE - offset:
                    raise RndisError("info_buflen", size, 16)
                start = HEADER_SIZE + offset
                information = data[start : start + size]
            return (Query if kind == MessageType.QUERY else Set)(request_id, oid, information)
        case MessageType.RESET:
            return Reset()
        case MessageType.KEEPALIVE:
            return Keepalive(*_body(_U32, data, length))
        case _:
            raise RndisError("ndis_msg_type", kind, 0, "not a request")


def _header(data: bytes, available: int) -> tuple[int, int]:
    if available < HEADER_SIZE or len(data) < HEADER_SIZE:
        raise RndisError("length", min(available, len(data)), 0)
    kind, length = _HEADER.unpack_from(data)
    if length < HEADER_SIZE or length > available:
        raise RndisError("msg_len", length, 4, f"{available} bytes are there")
    return kind, length


def _body(layout: struct.Struct, data: bytes, length: int) -> tuple[int, ...]:
    if length < layout.size:
        raise RndisError("msg_len", length, 4, f"less than {layout.size}")
    return layout.unpack_from(data)


# -- what the host sends --------------------------------------------------------------------------


def _message(kind: int, body: bytes) -> bytes:
    return _HEADER.pack(kind, HEADER_SIZE + len(body)) + body


def initialize_complete(request_id: int, status: int, max_transfer_size: int) -> bytes:
    """Completes INITIALIZE; the size is that of the guest's packets, in bytes."""
    body = struct.pack(
        "<11I",
        request_id,
        status,
        MAJOR_VERSION,
        0,
        CONNECTIONLESS,
        MEDIUM_802_3,
        MAX_PACKETS_PER_MESSAGE,
        max_transfer_size,
        ALIGNMENT_SHIFT,
        0,
        0,
    )
    return _message(MessageType.INITIALIZE | COMPLETION, body)


def query_complete(request_id: int, status: int, information: bytes = b"") -> bytes:
    """Completes QUERY. The offset is set even when there is nothing at it: Linux wants that."""
    body = struct.pack("<IIII", request_id, status, len(information), 16)
    return _message(MessageType.QUERY | COMPLETION, body + information)


def set_complete(request_id: int, status: int) -> bytes:
    """Completes SET."""
    return _message(MessageType.SET | COMPLETION, struct.pack("<II", request_id, status))


def reset_complete(status: int, addressing_reset: bool) -> bytes:
    """Completes RESET; the guest then sets filter and addresses again."""
    return _message(MessageType.RESET | COMPLETION, struct.pack("<II", status, addressing_reset))


def keepalive_complete(request_id: int, status: int) -> bytes:
    """Completes KEEPALIVE."""
    return _message(MessageType.KEEPALIVE | COMPLETION, struct.pack("<II", request_id, status))


def indicate_status(status: int, information: bytes = b"") -> bytes:
    """Tells the guest that something changed by itself."""
    offset = 12 if information else 0
    body = struct.pack("<III", status, len(information), offset)
    return _message(MessageType.INDICATE_STATUS, body + information)
