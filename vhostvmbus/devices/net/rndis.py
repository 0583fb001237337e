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
from typing import Final, NamedTuple

from vhostvmbus.devices.net import ppi
from vhostvmbus.devices.net.errors import PacketInfoError, RndisError

HEADER_SIZE: Final = 8
PACKET_SIZE: Final = 44
"""Bytes of a packet message before its per-packet information: header and body."""
MAX_CONTROL_SIZE: Final = 8192
"""Longest control message taken, in bytes. Linux has 4 KiB for what an OID says."""
MAX_PACKETS_PER_MESSAGE: Final = 64
"""Frames in one packet of the guest, announced in INITIALIZE_COMPLETE."""
ALIGNMENT_SHIFT: Final = 3
"""Packets in one section begin at multiples of 8 bytes; likewise."""
MAJOR_VERSION: Final = 1
CONNECTIONLESS: Final = 1
MEDIUM_802_3: Final = 0

COMPLETION: Final = 0x80000000
"""Flag in a type: the completion of that request."""


class MessageType(IntEnum):
    """``ndis_msg_type``."""

    PACKET = 1
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
    """What is the value of ``oid``? Some OIDs take information with the question."""

    request_id: int
    oid: int
    information: bytes


@dataclass(frozen=True, slots=True)
class Set:
    """The value of ``oid`` shall be ``information``."""

    request_id: int
    oid: int
    information: bytes


@dataclass(frozen=True, slots=True)
class Reset:
    """The card shall forget what was set."""


@dataclass(frozen=True, slots=True)
class Keepalive:
    """Are you there?"""

    request_id: int


Control = Initialize | Halt | Query | Set | Reset | Keepalive

_BODY = PACKET_SIZE - HEADER_SIZE
_HEADER = struct.Struct("<II")
_PACKET = struct.Struct("<11I")
_INITIALIZE = struct.Struct("<8xIIII")
_U32 = struct.Struct("<8xI")
_OID = struct.Struct("<8xIIIII")


def decode_control(data: bytes) -> Control:
    """The message at the start of ``data``, private memory; what is behind it is ignored.

    Raises :class:`RndisError`.
    """
    kind, length = _header(data, len(data))
    match kind:
        case MessageType.INITIALIZE:
            return Initialize(*_body(_INITIALIZE, data, length))
        case MessageType.HALT:
            return Halt(*_body(_U32, data, length))
        case MessageType.QUERY | MessageType.SET:
            request_id, oid, size, offset, _ = _body(_OID, data, length)
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


class PacketLayout(NamedTuple):
    """Where things are in a packet message; offsets count from the message's first byte."""

    length: int
    data_offset: int
    data_length: int
    info_offset: int
    info_length: int


def packet_layout(data: bytes, available: int, at: int = 0) -> PacketLayout:
    """The packet message at ``data[at:]``, of ``available`` bytes with what follows.

    ``data`` is private memory and has the message's first :data:`PACKET_SIZE` bytes or more.
    Raises :class:`RndisError`.
    """
    if available < PACKET_SIZE or len(data) - at < PACKET_SIZE:
        _header(data[at:], available)
        raise RndisError("msg_len", available, 4, f"less than {PACKET_SIZE}")
    kind, length, offset, size, oob_offset, oob_size, _, info_offset, info_size, _, _ = (
        _PACKET.unpack_from(data, at)
    )
    if kind != MessageType.PACKET:
        raise RndisError("ndis_msg_type", kind, 0, "not a packet")
    if not PACKET_SIZE <= length <= available:
        raise RndisError("msg_len", length, 4, f"{PACKET_SIZE} to {available}")
    room = length - HEADER_SIZE
    if offset < _BODY or offset > room:
        raise RndisError("data_offset", offset, 8)
    if size > room - offset:
        raise RndisError("data_len", size, 12)
    if oob_size and (oob_offset < _BODY or oob_size > room - oob_offset):
        raise RndisError("oob_data_len", oob_size, 20)
    if info_size:
        if info_offset < _BODY or info_offset > room:
            raise RndisError("per_pkt_info_offset", info_offset, 28)
        if info_size > room - info_offset:
            raise RndisError("per_pkt_info_len", info_size, 32)
        if info_size > ppi.MAX_SIZE:
            raise PacketInfoError("per_pkt_info_len", info_size, 32, f"at most {ppi.MAX_SIZE}")
    return PacketLayout(length, offset + HEADER_SIZE, size, info_offset + HEADER_SIZE, info_size)


# -- what the host sends --------------------------------------------------------------------------


def packet_header(data_offset: int, data_length: int, info: bytes = b"") -> bytes:
    """A packet message up to its frame, of which the last byte is the message's.

    ``data_offset`` counts from the message's first byte; the gap behind ``info`` is not written.
    """
    return (
        _PACKET.pack(
            MessageType.PACKET,
            data_offset + data_length,
            data_offset - HEADER_SIZE,
            data_length,
            0,
            0,
            0,
            PACKET_SIZE - HEADER_SIZE if info else 0,
            len(info),
            0,
            0,
        )
        + info
    )


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
    """Something changed by itself."""
    offset = 12 if information else 0
    body = struct.pack("<III", status, len(information), offset)
    return _message(MessageType.INDICATE_STATUS, body + information)
