# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire format of the synthetic storage protocol (vstor packets), bytes only.

Layouts: Linux ``drivers/scsi/storvsc_drv.c``, ``struct vstor_packet`` and ``struct
vmscsi_request``.  Little-endian throughout.  A vstor packet is a 12-byte header
(operation, flags, status) followed by a union.  Its biggest member is the SCSI request: 36
bytes in protocols 2.0 and 4.2, 52 bytes (16 bytes of queueing fields appended) from 5.1 on, so
a packet is 48 or 64 bytes long.

Invariants: decoding never raises anything but :class:`MalformedPacket`; a decoded request keeps
the bytes it came from, and its answer is those bytes with the answered fields replaced, so it
has the length that the guest used.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from vhostvmbus.wire.errors import GuestError, PacketError
from vhostvmbus.wire.ntstatus import NtStatus

HEADER_SIZE: Final = 12
"""Bytes of operation, flags and status."""
SHORT_PACKET_SIZE: Final = 48
"""Packet length in protocols 2.0 and 4.2."""
PACKET_SIZE: Final = 64
"""Packet length from protocol 5.1 on."""
SHORT_SENSE_SIZE: Final = 18
"""Room for sense data in protocols 2.0 and 4.2, in bytes."""
SENSE_SIZE: Final = 20
"""Room for sense data from protocol 5.1 on, in bytes."""
MIN_SRB_LENGTH: Final = 36
"""Smallest ``vmscsi_request.length``: the request without the queueing fields."""
MAX_CDB_LENGTH: Final = 16


class Operation(IntEnum):
    """The operation of a packet, ``enum vstor_packet_operation``."""

    COMPLETE_IO = 1
    REMOVE_DEVICE = 2
    EXECUTE_SRB = 3
    RESET_LUN = 4
    RESET_ADAPTER = 5
    RESET_BUS = 6
    BEGIN_INITIALIZATION = 7
    END_INITIALIZATION = 8
    QUERY_PROTOCOL_VERSION = 9
    QUERY_PROPERTIES = 10
    ENUMERATE_BUS = 11
    FCHBA_DATA = 12
    CREATE_SUB_CHANNELS = 13


EXECUTE_SRB: Final = Operation.EXECUTE_SRB.to_bytes(4, "little")
"""The beginning of a packet with a SCSI request."""


class Version(IntEnum):
    """``VMSTOR_PROTO_VERSION``: major in the high byte, minor in the low byte."""

    V2_0 = 0x0200
    V4_2 = 0x0402
    V5_1 = 0x0501
    V6_0 = 0x0600
    V6_2 = 0x0602

    @property
    def packet_size(self) -> int:
        """Bytes that every packet of this version has at least."""
        return PACKET_SIZE if self >= Version.V5_1 else SHORT_PACKET_SIZE

    @property
    def has_sub_channels(self) -> bool:
        """Tells whether a guest that speaks this version may ask for subchannels."""
        return self >= Version.V5_1

    def __str__(self) -> str:
        return f"{self >> 8}.{self & 0xFF}"


class SrbStatus(IntEnum):
    """Integer part (low 6 bits) of ``srb_status``; names as in Windows' ``srb.h``."""

    SUCCESS = 0x01
    ABORTED = 0x02
    ERROR = 0x04
    INVALID_REQUEST = 0x06
    DATA_OVERRUN = 0x12
    BAD_SRB_BLOCK_LENGTH = 0x15
    INVALID_LUN = 0x20


AUTOSENSE_VALID: Final = 0x80
"""Flag in ``srb_status``: the sense bytes of the answer are meaningful."""


class SrbFlags(IntFlag):
    """The bits of ``srb_flags`` (from 5.1) that concern a device."""

    DISABLE_AUTOSENSE = 0x20
    DATA_IN = 0x40
    DATA_OUT = 0x80


class DataDirection(IntEnum):
    """The direction of a transfer, ``vmscsi_request.data_in``."""

    WRITE = 0
    READ = 1
    UNKNOWN = 2


MULTI_CHANNEL: Final = 0x1
"""Channel property flag ``STORAGE_CHANNEL_SUPPORTS_MULTI_CHANNEL``, set from 5.1 on."""

_HEADER = struct.Struct("<III")
_SRB = struct.Struct("<4xI4xH2x4B4BI16s")
_SRB_FLAGS = struct.Struct("<I")
_SRB_FLAGS_OFFSET = 52
_ANSWER_HEAD = struct.Struct("<IIIHBB")
_ANSWER_TAIL = struct.Struct("<BBBBI")
_PROPERTIES = struct.Struct("<IHHIIQ")
_U16 = struct.Struct("<H")
_SENSE_OFFSET = 28


class MalformedPacket(PacketError):
    """A vstor packet that cannot be understood; ``offset`` counts from the packet's start.

    ``status`` is what the packet is completed with: it never stops the channel.
    """

    def __init__(
        self, field: str, value: int, offset: int, status: NtStatus, detail: str = ""
    ) -> None:
        super().__init__(field, value, offset, detail)
        self.status = status

    def __reduce__(self) -> tuple[type[GuestError], tuple[str, int, int, NtStatus, str]]:  # type: ignore[override]
        return type(self), (self.field, self.value, self.offset, self.status, self.detail)


@dataclass(slots=True)
class Srb:
    """A SCSI request as the guest sent it (``struct vmscsi_request`` inside its packet)."""

    raw: bytes
    """The vstor packet that carried the request."""
    flags: int
    length: int
    port: int
    path: int
    target: int
    lun: int
    cdb_length: int
    sense_room: int
    """Bytes of sense data that the guest can take."""
    direction: int
    transfer_length: int
    """Length of the data buffer, in bytes, as the guest states it."""
    cdb: bytes
    """All 16 bytes; those past ``cdb_length`` are not part of the command."""

    @property
    def srb_flags(self) -> int:
        """``srb_flags``, zero where the packet is too short to have them."""
        if len(self.raw) < PACKET_SIZE:
            return 0
        value: int = _SRB_FLAGS.unpack_from(self.raw, _SRB_FLAGS_OFFSET)[0]
        return value

    @property
    def takes_sense(self) -> bool:
        """Tells whether sense data can go with the completion: else the guest asks for them."""
        return bool(self.sense_room) and not self.srb_flags & SrbFlags.DISABLE_AUTOSENSE

    def answer(
        self,
        *,
        status: int = 0,
        srb_status: int = SrbStatus.SUCCESS,
        scsi_status: int = 0,
        transferred: int = 0,
        sense: bytes = b"",
    ) -> bytes:
        """Returns the completing packet.

        ``status`` is an NTSTATUS, ``transferred`` counts data bytes really moved.  ``sense`` is
        cut to what the guest can take; if that leaves something, the autosense flag is set.
        """
        raw = self.raw
        if sense:
            room = SENSE_SIZE if len(raw) >= PACKET_SIZE else SHORT_SENSE_SIZE
            sense = sense[: min(room, self.sense_room)] if self.takes_sense else b""
            if sense:
                srb_status |= AUTOSENSE_VALID
        return b"".join(
            (
                _ANSWER_HEAD.pack(
                    Operation.COMPLETE_IO, self.flags, status, self.length, srb_status, scsi_status
                ),
                raw[16:20],
                _ANSWER_TAIL.pack(self.cdb_length, len(sense), self.direction, 0, transferred),
                sense,
                raw[_SENSE_OFFSET + len(sense) :],
            )
        )


def decode_header(payload: bytes) -> tuple[int, int, int]:
    """Returns ``(operation, flags, status)`` of a packet. Raises :class:`MalformedPacket`."""
    if len(payload) < HEADER_SIZE:
        raise MalformedPacket("length", len(payload), 0, NtStatus.INVALID_PARAMETER)
    operation, flags, status = _HEADER.unpack_from(payload)
    return operation, flags, status


def decode_srb(payload: bytes, packet_size: int, *, exact: bool = True) -> Srb:
    """Returns the SCSI request of an EXECUTE_SRB or RESET packet of ``packet_size`` bytes or more.

    What is behind those is no part of it, unless ``exact`` is false: then the length tells which of
    the two layouts it is.

    The CDB and the LUN are not judged here: that has an answer in SCSI's terms.
    """
    if len(payload) < packet_size:
        raise MalformedPacket("length", len(payload), 0, NtStatus.INVALID_PARAMETER)
    flags, length, port, path, target, lun, cdb_length, sense, way, _, size, cdb = _SRB.unpack_from(
        payload
    )
    return Srb(
        payload[: packet_size if exact else size_of(payload)],
        flags,
        length,
        port,
        path,
        target,
        lun,
        cdb_length,
        sense,
        way,
        size,
        cdb,
    )


def decode_u16(payload: bytes, field: str) -> int:
    """Returns the 16-bit member at the start of the union (protocol version, subchannel count)."""
    if len(payload) < HEADER_SIZE + 2:
        raise MalformedPacket(field, len(payload), HEADER_SIZE, NtStatus.INVALID_PARAMETER)
    value: int = _U16.unpack_from(payload, HEADER_SIZE)[0]
    return value


def size_of(payload: bytes) -> int:
    """Returns how long a packet of the guest's layout is, by the length of one that it sent."""
    return SHORT_PACKET_SIZE if SHORT_PACKET_SIZE <= len(payload) < PACKET_SIZE else PACKET_SIZE


def answer_control(payload: bytes, status: int, body: bytes | None = None, size: int = 0) -> bytes:
    """Returns the completion of a control operation: the guest's packet with status and ``body``.

    It has ``size`` bytes or, as long as no version is agreed upon, as many as a packet of the
    guest's layout: Linux drops a completion that is shorter than its own packet, Windows wants
    exactly what the version says.  Works for a request of any length, even zero.
    """
    size = size or size_of(payload)
    flags = _HEADER.unpack_from(payload)[1] if len(payload) >= HEADER_SIZE else 0
    union = payload[HEADER_SIZE:] if body is None else body
    packet = _HEADER.pack(Operation.COMPLETE_IO, flags, status) + union
    return packet[:size].ljust(size, b"\0")


def properties(version: Version, max_sub_channels: int, max_transfer_bytes: int) -> bytes:
    """Returns a ``struct vmstorage_channel_properties``, 24 bytes."""
    flags = MULTI_CHANNEL if version.has_sub_channels else 0
    return _PROPERTIES.pack(0, max_sub_channels, 0, flags, max_transfer_bytes, 0)


def notification(operation: Operation, size: int) -> bytes:
    """Returns a packet of the host's own accord: ENUMERATE_BUS, REMOVE_DEVICE.

    Sent with transaction id 0. ``size`` is that of every packet of the version: Linux reads the
    operation alone, Windows looks at the length as well.
    """
    return _HEADER.pack(operation, 0, 0).ljust(size, b"\0")
