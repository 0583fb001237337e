# SPDX-License-Identifier: GPL-2.0-or-later
"""UNMAP and WRITE SAME (SBC-3 sections 4.7, 5.31, 5.41 to 5.43): thin provisioning.

There are no anchored blocks (ANC_SUP 0), so an ANCHOR bit is always an invalid field.
"""

from __future__ import annotations

import struct

from vhostvmbus.devices.scsi.cdb import Opcode
from vhostvmbus.devices.scsi.commands.inquiry import MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS
from vhostvmbus.devices.scsi.commands.transfer import check_extent, extent
from vhostvmbus.devices.scsi.lease import pieces
from vhostvmbus.devices.scsi.sense import (
    INVALID_OPCODE,
    PARAMETER_LIST_LENGTH,
    WRITE_PROTECTED,
    CheckCondition,
    invalid_field,
    invalid_parameter,
)
from vhostvmbus.devices.scsi.unit import BLOCK_SIZE, LogicalUnit, Request

_CHUNK_BLOCKS = 2048
_DESCRIPTOR = struct.Struct(">QI4x")


def unmap(unit: LogicalUnit, request: Request) -> int:
    """Does UNMAP (SBC-3 section 5.31): checks all descriptors before the first takes effect."""
    backing = unit.backing
    if backing.read_only:
        raise CheckCondition(WRITE_PROTECTED)
    if not backing.can_discard:
        raise CheckCondition(INVALID_OPCODE)
    if request.cdb[1] & 0x01:
        raise invalid_field(1, 0)
    length = request.u16(7)
    if not length:
        return 0
    if length < 8 or request.room < length:
        raise CheckCondition(PARAMETER_LIST_LENGTH)
    parameters = request.data.read(0, length)
    # A last, incomplete descriptor is to be ignored.
    described = int.from_bytes(parameters[2:4], "big")
    count = min(described, length - 8) // _DESCRIPTOR.size
    if count > MAX_UNMAP_DESCRIPTORS:
        raise invalid_parameter(2)
    extents: list[tuple[int, int]] = [
        _DESCRIPTOR.unpack_from(parameters, 8 + index * _DESCRIPTOR.size) for index in range(count)
    ]
    if sum(blocks for _, blocks in extents) > MAX_UNMAP_BLOCKS:
        raise invalid_parameter(8)
    for lba, blocks in extents:
        check_extent(unit, lba, blocks)
    for lba, blocks in extents:
        for offset, size in pieces(lba * BLOCK_SIZE, blocks * BLOCK_SIZE):
            with request.step(unit):
                backing.discard(offset, size)
    return length


def write_same(unit: LogicalUnit, request: Request) -> int:
    """Does WRITE SAME(10), (16) (SBC-3 sections 5.41, 5.42).

    UNMAP with a block of zeroes gives the space back.  With any other block it writes: what is
    read afterwards has to be that block.  NDOB (16 only) stands for a block of zeroes.
    """
    backing, cdb = unit.backing, request.cdb
    if backing.read_only:
        raise CheckCondition(WRITE_PROTECTED)
    if cdb[1] & 0xE0:
        raise invalid_field(1, 7)
    if cdb[1] & 0x10:
        raise invalid_field(1, 4)
    if cdb[1] & 0x06:  # PBDATA, LBDATA: obsolete
        raise invalid_field(1, 2)
    wants_unmap = bool(cdb[1] & 0x08)
    if wants_unmap and not backing.can_discard:
        raise invalid_field(1, 3)
    no_data = bool(cdb[1] & 0x01)
    if no_data and cdb[0] != Opcode.WRITE_SAME_16:
        raise invalid_field(1, 0)
    lba, blocks, field = extent(cdb)
    check_extent(unit, lba, blocks)
    if not 0 < blocks <= MAX_UNMAP_BLOCKS:
        raise invalid_field(field)
    if no_data:
        block = bytes(BLOCK_SIZE)
    elif request.room < BLOCK_SIZE:
        raise invalid_field(1, 0)
    else:
        block = request.data.read(0, BLOCK_SIZE)
    if not any(block):
        for offset, size in pieces(lba * BLOCK_SIZE, blocks * BLOCK_SIZE):
            with request.step(unit):
                backing.write_zeroes(offset, size, unmap=wants_unmap)
    else:
        chunk = block * min(blocks, _CHUNK_BLOCKS)
        for at in range(0, blocks, _CHUNK_BLOCKS):
            count = min(_CHUNK_BLOCKS, blocks - at) * BLOCK_SIZE
            with request.step(unit):
                backing.write((lba + at) * BLOCK_SIZE, chunk[:count])
    if not unit.write_cache:
        backing.flush()
    return 0 if no_data else BLOCK_SIZE
