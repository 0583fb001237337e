# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that tell about the unit or its power, and move no user data."""

from __future__ import annotations

import struct

from vhostvmbus.devices.scsi.sense import invalid_field, out_of_range
from vhostvmbus.devices.scsi.unit import (
    BLOCK_SIZE,
    BLOCKS_PER_PHYSICAL_EXPONENT,
    LogicalUnit,
    Request,
)


def test_unit_ready(unit: LogicalUnit, request: Request) -> int:
    """Does TEST UNIT READY (SPC-4 section 6.47); the dispatcher has checked that the unit is."""
    return 0


def request_sense(unit: LogicalUnit, request: Request) -> int:
    """Does REQUEST SENSE (SPC-4 section 6.39).

    Reports what an earlier command kept, else a pending unit attention, else NO SENSE.
    """
    sense = unit.take_sense()
    payload = sense.descriptor() if request.cdb[1] & 0x01 else sense.fixed()
    return request.reply(payload, request.cdb[4])


def read_capacity_10(unit: LogicalUnit, request: Request) -> int:
    """Does READ CAPACITY(10) (SBC-3 section 5.15)."""
    if not request.cdb[8] & 0x01 and request.u32(2):
        raise invalid_field(2)
    last = min(unit.blocks - 1, 0xFFFFFFFF)
    return request.reply(struct.pack(">II", last, BLOCK_SIZE), 8)


def read_capacity_16(unit: LogicalUnit, request: Request) -> int:
    """Does READ CAPACITY(16) (SBC-3 section 5.16), 32 bytes."""
    provisioning = 0
    if unit.backing.can_discard:
        provisioning = 0x80 | (0x40 if unit.backing.discard_zeroes else 0)
    payload = struct.pack(
        ">QIBBBx16x",
        unit.blocks - 1,
        BLOCK_SIZE,
        0,
        BLOCKS_PER_PHYSICAL_EXPONENT,
        provisioning,
    )
    return request.reply(payload, request.u32(10))


def get_lba_status(unit: LogicalUnit, request: Request) -> int:
    """Does GET LBA STATUS (SBC-3 section 5.4): one descriptor, for the extent at the address."""
    lba = request.u64(2)
    if lba >= unit.blocks:
        raise out_of_range(lba)
    mapped, length = unit.backing.mapped_extent(lba * BLOCK_SIZE)
    blocks = max(1, min(length // BLOCK_SIZE, unit.blocks - lba, 0xFFFFFFFF))
    body = struct.pack(">QIB3x", lba, blocks, 0 if mapped else 1)
    return request.reply(struct.pack(">I4x", 4 + len(body)) + body, request.u32(10))


def start_stop_unit(unit: LogicalUnit, request: Request) -> int:
    """Does START STOP UNIT (SBC-3 section 5.25): a stop flushes, and nothing is refused after it.

    There is no motor. A unit that wants to be started first would be lost to a guest that forgets
    it, and some have no way to remember: Linux returns the error to whoever reads or writes, and
    what writes a memory dump or a hibernation file starts no disk.
    """
    condition = request.cdb[4] >> 4
    if condition:
        if condition > 3:
            raise invalid_field(4, 7)
        return 0
    if request.cdb[4] & 0x02:  # LOEJ: the medium is not removable
        raise invalid_field(4, 1)
    start, no_flush = request.cdb[4] & 0x01, request.cdb[4] & 0x04
    if not (start or no_flush or unit.backing.read_only):
        unit.backing.flush()
    return 0


def prevent_allow(unit: LogicalUnit, request: Request) -> int:
    """Does PREVENT ALLOW MEDIUM REMOVAL (SPC-4 section 6.18): the medium never leaves."""
    return 0


def report_luns_data(luns: list[int]) -> bytes:
    """Returns REPORT LUNS data (SPC-4 section 6.35), single-level peripheral addresses."""
    entries = b"".join(struct.pack(">BB6x", 0, lun) for lun in luns)
    return struct.pack(">I4x", len(entries)) + entries


def report_luns(luns: list[int], request: Request) -> int:
    """Does REPORT LUNS (SPC-4 section 6.35); there are no well-known logical units."""
    select = request.cdb[2]
    if select > 2:
        raise invalid_field(2)
    return request.reply(report_luns_data([] if select == 1 else luns), request.u32(6))
