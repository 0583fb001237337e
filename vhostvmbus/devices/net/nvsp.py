# SPDX-License-Identifier: GPL-2.0-or-later
"""The network virtualization protocol (NVSP): its messages, bytes only.

Layouts: Linux ``drivers/net/hyperv/hyperv_net.h``, ``struct nvsp_message``. Little-endian
throughout: ``message_type u32``, then a union, packed. The biggest member gives a message of 40
bytes, and of 28 before version 6.1. All of this end's messages have exactly the length of the
version (:func:`message_size`): Windows' driver takes no other, and Linux' copies as much from the
ring without looking at the packet's. Messages of the guest may be as short as their own fields.

Invariants: decoding raises nothing but :class:`NvspError`; a message that the negotiated version
does not have is refused, whatever is in it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

from vhostvmbus.devices.net.errors import NvspError
from vhostvmbus.devices.net.status import NOT_SUPPORTED
from vhostvmbus.engine import lib

MESSAGE_SIZE: Final[int] = lib.VVB_NET_NVSP_SIZE
"""The bytes of ``struct nvsp_message``: of a message in the newest version."""
OLD_MESSAGE_SIZE: Final[int] = lib.VVB_NET_NVSP_OLD_SIZE
"""The bytes of a message up to version 6."""
NO_SECTION: Final[int] = lib.VVB_NET_NVSP_NO_SECTION
"""A section index that says that the send buffer is not used."""
SEND_TABLE_SIZE: Final = 16
"""The entries of the send indirection table; Linux takes no other number."""
MAX_MDL_CHAIN_LENGTH: Final = 34
"""The number announced in INIT_COMPLETE; no driver of today looks at it."""


class Version(IntEnum):
    """A protocol version; the number is what the wire has."""

    V1 = 0x00002
    V2 = 0x30002
    V4 = 0x40000
    V5 = 0x50000
    V6 = 0x60000
    V6_1 = 0x60001

    def __str__(self) -> str:
        return self.name[1:].replace("_", ".")


class MessageType(IntEnum):
    """The numbers of ``hdr.msg_type``.

    Chimney and VMQ messages are not among them: they get no answer.
    """

    INIT = 1
    INIT_COMPLETE = 2
    SEND_NDIS_VERSION = 100
    SEND_RECEIVE_BUFFER = 101
    SEND_RECEIVE_BUFFER_COMPLETE = 102
    REVOKE_RECEIVE_BUFFER = 103
    SEND_SEND_BUFFER = 104
    SEND_SEND_BUFFER_COMPLETE = 105
    REVOKE_SEND_BUFFER = 106
    SEND_RNDIS_PACKET = lib.VVB_NET_NVSP_RNDIS_PACKET
    SEND_RNDIS_PACKET_COMPLETE = lib.VVB_NET_NVSP_RNDIS_PACKET_COMPLETE
    SEND_NDIS_CONFIG = 125
    SEND_VF_ASSOCIATION = 128
    SWITCH_DATA_PATH = 129
    UPLINK_CONNECT_STATE = 130
    OID_QUERY_EX = 131
    OID_QUERY_EX_COMPLETE = 132
    SUBCHANNEL = 133
    SEND_INDIRECTION_TABLE = 134
    PACKET_DIRECT = 135


class Status(IntEnum):
    """The values of ``NVSP_STAT_*``."""

    SUCCESS = lib.VVB_NET_NVSP_SUCCESS
    FAIL = 2
    PROTOCOL_TOO_NEW = 3
    PROTOCOL_TOO_OLD = 4
    INVALID_RNDIS_PACKET = 5
    BUSY = 6
    PROTOCOL_UNSUPPORTED = 7


class Capability(IntFlag):
    """A capability of the guest's driver, ``struct nvsp_2_vsc_capability``."""

    VMQ = 0x01
    CHIMNEY = 0x02
    SRIOV = 0x04
    IEEE8021Q = 0x08
    CORRELATION_ID = 0x10
    TEAMING = 0x20
    VSUBNET_ID = 0x40
    RSC = 0x80


class RndisChannel(IntEnum):
    """The ``channel_type`` of SEND_RNDIS_PACKET."""

    DATA = lib.VVB_NET_NVSP_DATA
    CONTROL = 1


@dataclass(frozen=True, slots=True)
class Init:
    """The versions that the guest takes, lowest and highest."""

    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class NdisVersion:
    """The NDIS version whose structures the guest uses."""

    major: int
    minor: int


@dataclass(frozen=True, slots=True)
class SendBuffer:
    """A buffer that the guest lends: for receiving if ``receive``, else for sending."""

    receive: bool
    gpadl: int
    buffer_id: int


@dataclass(frozen=True, slots=True)
class RevokeBuffer:
    """A buffer that must not be touched any more once this is completed."""

    receive: bool
    buffer_id: int


class RndisPacket(NamedTuple):
    """A packet with RNDIS messages, in a send section (index, bytes used) and in its own pages."""

    channel: int
    section: int
    size: int


@dataclass(frozen=True, slots=True)
class RndisPacketComplete:
    """Says that the peer is done with an RNDIS packet."""

    status: int


@dataclass(frozen=True, slots=True)
class NdisConfig:
    """The guest's configuration, from version 2.

    ``frame_size`` is the guest's MTU and 14 bytes of Ethernet header.
    """

    frame_size: int
    capabilities: Capability


@dataclass(frozen=True, slots=True)
class SwitchDataPath:
    """A switch of the data path, from version 4: 0 the synthetic path, 1 a virtual function."""

    active: int


@dataclass(frozen=True, slots=True)
class OidQueryEx:
    """A query beside RNDIS, from version 5."""


@dataclass(frozen=True, slots=True)
class Subchannels:
    """A request for ``count`` subchannels if ``operation`` is 1, from version 5."""

    operation: int
    count: int


@dataclass(frozen=True, slots=True)
class PacketDirect:
    """An operation of the packet-direct interface, from version 6."""

    operation: int


Message = (
    Init
    | NdisVersion
    | SendBuffer
    | RevokeBuffer
    | RndisPacketComplete
    | NdisConfig
    | SwitchDataPath
    | OidQueryEx
    | Subchannels
    | PacketDirect
)

RNDIS_PACKET: Final = MessageType.SEND_RNDIS_PACKET.to_bytes(4, "little")
"""The beginning of an RNDIS packet."""
_U32 = struct.Struct("<I")
_TWO = struct.Struct("<4xII")
_THREE = struct.Struct("<4xIII")
_BUFFER = struct.Struct("<4xIH")
_ID = struct.Struct("<4xH")
_ONE = struct.Struct("<4xI")
_CONFIG = struct.Struct("<4xI4xQ")
_LAYOUT: dict[int, tuple[struct.Struct, int]] = {
    MessageType.INIT: (_TWO, 0),
    MessageType.SEND_NDIS_VERSION: (_TWO, Version.V1),
    MessageType.SEND_RECEIVE_BUFFER: (_BUFFER, Version.V1),
    MessageType.REVOKE_RECEIVE_BUFFER: (_ID, Version.V1),
    MessageType.SEND_SEND_BUFFER: (_BUFFER, Version.V1),
    MessageType.REVOKE_SEND_BUFFER: (_ID, Version.V1),
    MessageType.SEND_RNDIS_PACKET_COMPLETE: (_ONE, Version.V1),
    MessageType.SEND_NDIS_CONFIG: (_CONFIG, Version.V2),
    MessageType.SWITCH_DATA_PATH: (_ONE, Version.V4),
    MessageType.OID_QUERY_EX: (_U32, Version.V5),
    MessageType.SUBCHANNEL: (_TWO, Version.V5),
    MessageType.PACKET_DIRECT: (_ONE, Version.V6),
}


def decode(payload: bytes, version: int) -> Message:
    """Decodes the guest's message; ``version`` 0 before the negotiation, when there is only INIT.

    An RNDIS packet is none of these: :func:`decode_rndis_packet`. Raises :class:`NvspError`.
    """
    if len(payload) < 4:
        raise NvspError("length", len(payload), 0)
    (kind,) = _U32.unpack_from(payload)
    layout, since = _LAYOUT.get(kind, (_U32, None))
    if since is None:
        raise NvspError("msg_type", kind, 0, "unknown")
    if version < since:
        raise NvspError("msg_type", kind, 0, f"not in version {version:#x}")
    if len(payload) < layout.size:
        raise NvspError("length", len(payload), 0, f"of a message of type {kind}")
    fields = layout.unpack_from(payload)
    match kind:
        case MessageType.INIT:
            return Init(*fields)
        case MessageType.SEND_NDIS_VERSION:
            return NdisVersion(*fields)
        case MessageType.SEND_RECEIVE_BUFFER | MessageType.SEND_SEND_BUFFER:
            return SendBuffer(kind == MessageType.SEND_RECEIVE_BUFFER, *fields)
        case MessageType.REVOKE_RECEIVE_BUFFER | MessageType.REVOKE_SEND_BUFFER:
            return RevokeBuffer(kind == MessageType.REVOKE_RECEIVE_BUFFER, *fields)
        case MessageType.SEND_RNDIS_PACKET_COMPLETE:
            return RndisPacketComplete(*fields)
        case MessageType.SEND_NDIS_CONFIG:
            return NdisConfig(fields[0], Capability(fields[1]))
        case MessageType.SWITCH_DATA_PATH:
            return SwitchDataPath(*fields)
        case MessageType.OID_QUERY_EX:
            return OidQueryEx()
        case MessageType.SUBCHANNEL:
            return Subchannels(*fields)
        case _:
            return PacketDirect(*fields)


def decode_rndis_packet(payload: bytes) -> RndisPacket:
    """Decodes what begins like :data:`RNDIS_PACKET`, which every version has."""
    if len(payload) < _THREE.size:
        raise NvspError("length", len(payload), 0, "of an RNDIS packet")
    return RndisPacket(*_THREE.unpack_from(payload))


def negotiate(message: Init) -> tuple[Status, Version | None]:
    """Returns the highest version that both ends take, or why there is none."""
    both = [known for known in Version if message.minimum <= known <= message.maximum]
    if both:
        return Status.SUCCESS, both[-1]
    if message.minimum > max(Version):
        return Status.PROTOCOL_TOO_NEW, None
    if message.maximum < min(Version):
        return Status.PROTOCOL_TOO_OLD, None
    return Status.PROTOCOL_UNSUPPORTED, None


def message_size(version: int) -> int:
    """Returns the bytes of each message of the host in that version."""
    return MESSAGE_SIZE if version >= Version.V6_1 else OLD_MESSAGE_SIZE


def _message(kind: MessageType, body: bytes) -> bytes:
    """Returns a message as long as the newest version has it; an older one has its beginning."""
    return (_U32.pack(kind) + body).ljust(MESSAGE_SIZE, b"\0")


def init_complete(status: Status, version: int) -> bytes:
    """Completes INIT."""
    body = struct.pack("<III", version, MAX_MDL_CHAIN_LENGTH, status)
    return _message(MessageType.INIT_COMPLETE, body)


def receive_buffer_complete(status: Status, section_size: int = 0, sections: int = 0) -> bytes:
    """Completes SEND_RECEIVE_BUFFER: one run of sections from offset 0, or none.

    Linux wants exactly one run, from 0.
    """
    body = struct.pack("<II", status, 1 if sections else 0)
    body += struct.pack("<IIII", 0, section_size, sections, section_size * sections)
    return _message(MessageType.SEND_RECEIVE_BUFFER_COMPLETE, body)


def send_buffer_complete(status: Status, section_size: int = 0) -> bytes:
    """Completes SEND_SEND_BUFFER."""
    return _message(MessageType.SEND_SEND_BUFFER_COMPLETE, struct.pack("<II", status, section_size))


def rndis_packet(channel: RndisChannel) -> bytes:
    """Returns the payload of a transfer page packet with RNDIS messages."""
    body = struct.pack("<III", channel, NO_SECTION, 0)
    return _message(MessageType.SEND_RNDIS_PACKET, body)


def rndis_packet_complete(status: Status) -> bytes:
    """Completes SEND_RNDIS_PACKET, in either direction."""
    return _message(MessageType.SEND_RNDIS_PACKET_COMPLETE, _U32.pack(status))


def subchannels_complete(status: Status, count: int) -> bytes:
    """Completes SUBCHANNEL: so many will be offered."""
    return _message(MessageType.SUBCHANNEL, struct.pack("<II", status, count))


def packet_direct_complete(operation: int) -> bytes:
    """Completes a packet-direct operation: not supported, not enabled, no queues.

    Its status is an NTSTATUS.
    """
    return _message(MessageType.PACKET_DIRECT, struct.pack("<II", operation, NOT_SUPPORTED))


def oid_query_ex_complete() -> bytes:
    """Completes OID_QUERY_EX: not supported, no bytes. Its status is an NTSTATUS."""
    return _message(MessageType.OID_QUERY_EX_COMPLETE, struct.pack("<II", NOT_SUPPORTED, 0))


def indirection_table(entries: Sequence[int], size: int = MESSAGE_SIZE) -> bytes:
    """Returns SEND_INDIRECTION_TABLE: the channel of each of :data:`SEND_TABLE_SIZE` hash values.

    The table stands behind a whole message of ``size`` bytes. Linux looks for it behind 40 bytes in
    versions up to 6, whatever the offset says, if the packet is long enough for that.
    """
    if len(entries) != SEND_TABLE_SIZE:
        raise ValueError(f"a send indirection table has {SEND_TABLE_SIZE} entries")
    body = struct.pack("<II", len(entries), size)
    message = _message(MessageType.SEND_INDIRECTION_TABLE, body)
    return message[:size] + struct.pack(f"<{len(entries)}I", *entries)
