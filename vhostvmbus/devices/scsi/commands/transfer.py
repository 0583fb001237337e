# SPDX-License-Identifier: GPL-2.0-or-later
"""READ, WRITE, VERIFY, WRITE AND VERIFY, SYNCHRONIZE CACHE (SBC-3 section 5).

Rules: the whole range is checked before the first byte moves; a data buffer shorter than the
range is refused (INVALID FIELD IN CDB at the transfer length), never half served; with FUA, or
with the write cache off, data are durable before the command completes.
"""

from __future__ import annotations

import struct

from vhostvmbus.devices.scsi.sense import (
    WRITE_PROTECTED,
    CheckCondition,
    invalid_field,
    miscompare,
    out_of_range,
)
from vhostvmbus.devices.scsi.unit import BLOCK_SIZE, LogicalUnit, Request

_LBA32 = struct.Struct(">2xIxH")
_LBA32_LONG = struct.Struct(">2xII")
_LBA64 = struct.Struct(">2xQI")
_CHUNK = 1 << 20


def extent(cdb: bytes) -> tuple[int, int, int]:
    """Returns ``(lba, blocks, offset of the length field)`` of a CDB of 6, 10, 12 or 16 bytes."""
    match cdb[0] >> 5:
        case 0:
            return int.from_bytes(cdb[1:4], "big") & 0x1FFFFF, cdb[4] or 256, 4
        case 4:
            lba, blocks = _LBA64.unpack_from(cdb)
            return lba, blocks, 10
        case 5:
            lba, blocks = _LBA32_LONG.unpack_from(cdb)
            return lba, blocks, 6
        case _:
            lba, blocks = _LBA32.unpack_from(cdb)
            return lba, blocks, 7


def check_extent(unit: LogicalUnit, lba: int, blocks: int) -> None:
    """Raises LBA OUT OF RANGE unless the range lies on the disk; an empty one may be at its end."""
    total = unit.blocks
    if lba > total or (lba == total and blocks):
        raise out_of_range(lba)
    if lba + blocks > total:
        raise out_of_range(total)


def _range(unit: LogicalUnit, request: Request, *, data: bool) -> tuple[int, int]:
    """Returns byte offset and length of the command's range; with ``data``, the buffer holds it."""
    lba, blocks, field = extent(request.cdb)
    check_extent(unit, lba, blocks)
    if blocks > unit.max_transfer_blocks:
        raise invalid_field(field)
    length = blocks * BLOCK_SIZE
    if data and length > request.room:
        raise invalid_field(field)
    return lba * BLOCK_SIZE, length


def _refuse_protection(request: Request) -> None:
    """Refuses RDPROTECT, WRPROTECT, VRPROTECT: the disk has no protection information."""
    if request.cdb[0] >> 5 and request.cdb[1] & 0xE0:
        raise invalid_field(1, 7)


def must_be_durable(unit: LogicalUnit, cdb: bytes) -> bool:
    """Returns whether a WRITE has FUA set (10, 12, 16 bytes) or there is no write cache."""
    return not unit.write_cache or (cdb[0] >> 5 != 0 and bool(cdb[1] & 0x08))


def _refuse_read_only(unit: LogicalUnit) -> None:
    if unit.backing.read_only:
        raise CheckCondition(WRITE_PROTECTED)


def read_would_wait(unit: LogicalUnit, cdb: bytes) -> bool:
    """Returns whether a READ that is in range needs data that the host has to fetch."""
    lba, blocks, _ = extent(cdb)
    if not blocks or blocks > unit.max_transfer_blocks or lba + blocks > unit.blocks:
        return False
    return unit.backing.would_wait(lba * BLOCK_SIZE, blocks * BLOCK_SIZE)


def read(unit: LogicalUnit, request: Request) -> int:
    """Does READ(6), (10), (12), (16) (SBC-3 sections 5.10 to 5.13)."""
    _refuse_protection(request)
    offset, length = _range(unit, request, data=True)
    if length:
        unit.backing.read_into(request.data, offset, length)
    return length


def write(unit: LogicalUnit, request: Request) -> int:
    """Does WRITE(6), (10), (12), (16) (SBC-3 sections 5.32 to 5.35)."""
    _refuse_read_only(unit)
    _refuse_protection(request)
    offset, length = _range(unit, request, data=True)
    if length:
        with request.step(unit):
            unit.backing.write_from(request.data, offset, length)
        if must_be_durable(unit, request.cdb):
            unit.backing.flush()
    return length


def _byte_check(request: Request) -> int:
    check = request.cdb[1] >> 1 & 0x03
    if check == 2:
        raise invalid_field(1, 2)
    return check


def _compare(unit: LogicalUnit, request: Request, offset: int, wanted: bytes) -> None:
    """Raises MISCOMPARE at the first byte of the medium that differs from ``wanted``."""
    for at in range(0, len(wanted), _CHUNK):
        request.lease.check()
        expected = wanted[at : at + _CHUNK]
        found = unit.backing.read(offset + at, len(expected))
        if found != expected:
            pairs = zip(found, expected, strict=True)
            raise miscompare(at + next(i for i, (a, b) in enumerate(pairs) if a != b))


def _read_through(unit: LogicalUnit, request: Request, offset: int, length: int) -> None:
    for at in range(0, length, _CHUNK):
        request.lease.check()
        unit.backing.read(offset + at, min(_CHUNK, length - at))


def verify(unit: LogicalUnit, request: Request) -> int:
    """Does VERIFY(10), (12), (16) (SBC-3 sections 5.27 to 5.29).

    BYTCHK 0 reads the range, 1 compares it with the data, 3 each block with the one block sent.
    """
    _refuse_protection(request)
    check = _byte_check(request)
    offset, length = _range(unit, request, data=check == 1)
    if not length:
        return 0
    if check == 0:
        _read_through(unit, request, offset, length)
        return 0
    if check == 1:
        _compare(unit, request, offset, request.data.read(0, length))
        return length
    if request.room < BLOCK_SIZE:
        raise invalid_field(1, 2)
    block = request.data.read(0, BLOCK_SIZE)
    _compare(unit, request, offset, block * (length // BLOCK_SIZE))
    return BLOCK_SIZE


def write_and_verify(unit: LogicalUnit, request: Request) -> int:
    """Does WRITE AND VERIFY(10), (12), (16) (SBC-3 sections 5.37 to 5.39): writes, and means it.

    The data are durable before they are read back; BYTCHK 1 compares them too.
    """
    _refuse_read_only(unit)
    _refuse_protection(request)
    check = _byte_check(request)
    if check == 3:
        raise invalid_field(1, 2)
    offset, length = _range(unit, request, data=True)
    if not length:
        return 0
    payload = request.data.read(0, length)
    with request.step(unit):
        unit.backing.write(offset, payload)
    unit.backing.flush()
    if check:
        _compare(unit, request, offset, payload)
    else:
        _read_through(unit, request, offset, length)
    return length


def synchronize_cache(unit: LogicalUnit, request: Request) -> int:
    """Does SYNCHRONIZE CACHE(10), (16) (SBC-3 sections 5.26, 5.27): flushes the whole disk.

    Zero blocks means to the end.  IMMED is ignored: the command completes when it is done.
    """
    lba, blocks, _ = extent(request.cdb)
    check_extent(unit, lba, blocks)
    if not unit.backing.read_only:
        unit.backing.flush()
    return 0
