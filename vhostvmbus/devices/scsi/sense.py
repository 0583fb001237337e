# SPDX-License-Identifier: GPL-2.0-or-later
"""Sense data: why a SCSI command failed (SPC-4 section 4.5).

Invariant: a :class:`Sense` always encodes to 18 bytes in fixed format, which every protocol
version has room for.  Big-endian, as everything in SCSI.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

FIXED_SIZE: Final = 18
"""Length of fixed format sense data, bytes."""


class Key(IntEnum):
    """Sense keys, SPC-4 table 48."""

    NO_SENSE = 0x0
    NOT_READY = 0x2
    MEDIUM_ERROR = 0x3
    HARDWARE_ERROR = 0x4
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    MISCOMPARE = 0xE


@dataclass(frozen=True, slots=True)
class Sense:
    """Sense key, additional sense code and qualifier, and what may accompany them."""

    key: int
    asc: int = 0
    ascq: int = 0
    information: int | None = None
    """An LBA or a byte offset, as the command defines it."""
    field: int | None = None
    """Byte of the CDB or the parameter list that is at fault."""
    bit: int | None = None
    """Most significant bit of the field at fault."""
    in_cdb: bool = True

    def _key_specific(self) -> bytes:
        """Returns the field pointer (SPC-4 section 4.5.2.4.2), or zeroes."""
        if self.field is None:
            return bytes(3)
        first = 0x80 | (0x40 if self.in_cdb else 0)
        if self.bit is not None:
            first |= 0x08 | self.bit
        return struct.pack(">BH", first, self.field & 0xFFFF)

    def fixed(self) -> bytes:
        """Returns fixed format (SPC-4 section 4.5.3), 18 bytes."""
        known = self.information is not None and self.information <= 0xFFFFFFFF
        information = self.information if known and self.information is not None else 0
        return struct.pack(
            ">BxBIB4xBBx3s",
            0xF0 if known else 0x70,
            self.key,
            information,
            FIXED_SIZE - 8,
            self.asc,
            self.ascq,
            self._key_specific(),
        )

    def descriptor(self) -> bytes:
        """Returns descriptor format (SPC-4 section 4.5.2), only as long as needed."""
        parts = b""
        if self.information is not None:
            parts += struct.pack(">BBBxQ", 0x00, 0x0A, 0x80, self.information)
        if self.field is not None:
            parts += struct.pack(">BB2x3sx", 0x02, 0x06, self._key_specific())
        return struct.pack(">4B3xB", 0x72, self.key, self.asc, self.ascq, len(parts)) + parts


class CheckCondition(Exception):
    """Ends a command with CHECK CONDITION and the given sense data."""

    def __init__(self, sense: Sense) -> None:
        super().__init__(
            f"sense key {sense.key:#x}, additional code {sense.asc:02x}h/{sense.ascq:02x}h"
        )
        self.sense = sense


NO_SENSE: Final = Sense(Key.NO_SENSE)
INVALID_OPCODE: Final = Sense(Key.ILLEGAL_REQUEST, 0x20, 0x00, field=0)
LOGICAL_UNIT_NOT_SUPPORTED: Final = Sense(Key.ILLEGAL_REQUEST, 0x25, 0x00)
PARAMETER_LIST_LENGTH: Final = Sense(Key.ILLEGAL_REQUEST, 0x1A, 0x00)
SAVING_NOT_SUPPORTED: Final = Sense(Key.ILLEGAL_REQUEST, 0x39, 0x00)
WRITE_PROTECTED: Final = Sense(Key.DATA_PROTECT, 0x27, 0x00)
SPACE_ALLOCATION_FAILED: Final = Sense(Key.DATA_PROTECT, 0x27, 0x07)
READ_ERROR: Final = Sense(Key.MEDIUM_ERROR, 0x11, 0x00)
WRITE_ERROR: Final = Sense(Key.MEDIUM_ERROR, 0x0C, 0x00)
INTERNAL_FAILURE: Final = Sense(Key.HARDWARE_ERROR, 0x44, 0x00)
BECOMING_READY: Final = Sense(Key.NOT_READY, 0x04, 0x01)
MEDIUM_NOT_PRESENT: Final = Sense(Key.NOT_READY, 0x3A, 0x00)
BUS_RESET: Final = Sense(Key.UNIT_ATTENTION, 0x29, 0x02)
DEVICE_RESET: Final = Sense(Key.UNIT_ATTENTION, 0x29, 0x03)
CAPACITY_CHANGED: Final = Sense(Key.UNIT_ATTENTION, 0x2A, 0x09)


def invalid_field(field: int, bit: int | None = None) -> CheckCondition:
    """Returns INVALID FIELD IN CDB, pointing at byte ``field`` (and bit) of the CDB."""
    return CheckCondition(Sense(Key.ILLEGAL_REQUEST, 0x24, 0x00, field=field, bit=bit))


def invalid_parameter(field: int, bit: int | None = None) -> CheckCondition:
    """Returns INVALID FIELD IN PARAMETER LIST, pointing into the data that the guest sent."""
    return CheckCondition(
        Sense(Key.ILLEGAL_REQUEST, 0x26, 0x00, field=field, bit=bit, in_cdb=False)
    )


def out_of_range(lba: int) -> CheckCondition:
    """Returns LOGICAL BLOCK ADDRESS OUT OF RANGE; the information is the address asked for."""
    return CheckCondition(Sense(Key.ILLEGAL_REQUEST, 0x21, 0x00, information=lba))


def miscompare(offset: int) -> CheckCondition:
    """Returns MISCOMPARE DURING VERIFY OPERATION at byte ``offset`` of the data sent."""
    return CheckCondition(Sense(Key.MISCOMPARE, 0x1D, 0x00, information=offset))


def from_os_error(error: OSError, *, writing: bool) -> Sense:
    """Returns the sense data for an error of the host's file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SPACE_ALLOCATION_FAILED
    if error.errno in (errno.EROFS, errno.EPERM, errno.EACCES):
        return WRITE_PROTECTED if writing else INTERNAL_FAILURE
    if error.errno in (errno.EIO, errno.EFBIG, errno.ENXIO, errno.EREMOTEIO, errno.ENODATA):
        return WRITE_ERROR if writing else READ_ERROR
    return INTERNAL_FAILURE
