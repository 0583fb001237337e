# SPDX-License-Identifier: GPL-2.0-or-later
"""Command descriptor blocks: the operation codes that the disks here know.

Names as in SPC-4 and SBC-3; the length of the CDB in bytes stands behind a name that several
commands share.  What each one does is in :mod:`.commands.table`.
"""

from __future__ import annotations

from enum import IntEnum


class Opcode(IntEnum):
    """Operation code, byte 0 of a CDB; its top three bits say how long the CDB is."""

    TEST_UNIT_READY = 0x00
    REQUEST_SENSE = 0x03
    READ_6 = 0x08
    WRITE_6 = 0x0A
    INQUIRY = 0x12
    MODE_SELECT_6 = 0x15
    MODE_SENSE_6 = 0x1A
    START_STOP_UNIT = 0x1B
    PREVENT_ALLOW_MEDIUM_REMOVAL = 0x1E
    READ_CAPACITY_10 = 0x25
    READ_10 = 0x28
    WRITE_10 = 0x2A
    WRITE_AND_VERIFY_10 = 0x2E
    VERIFY_10 = 0x2F
    SYNCHRONIZE_CACHE_10 = 0x35
    WRITE_SAME_10 = 0x41
    UNMAP = 0x42
    MODE_SELECT_10 = 0x55
    MODE_SENSE_10 = 0x5A
    READ_16 = 0x88
    WRITE_16 = 0x8A
    WRITE_AND_VERIFY_16 = 0x8E
    VERIFY_16 = 0x8F
    SYNCHRONIZE_CACHE_16 = 0x91
    WRITE_SAME_16 = 0x93
    SERVICE_ACTION_IN_16 = 0x9E
    """READ CAPACITY(16) and GET LBA STATUS, told apart by the service action."""
    REPORT_LUNS = 0xA0
    MAINTENANCE_IN = 0xA3
    """REPORT SUPPORTED OPERATION CODES, by its service action."""
    READ_12 = 0xA8
    WRITE_12 = 0xAA
    WRITE_AND_VERIFY_12 = 0xAE
    VERIFY_12 = 0xAF
