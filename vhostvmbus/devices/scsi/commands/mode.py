# SPDX-License-Identifier: GPL-2.0-or-later
"""MODE SENSE and MODE SELECT (SPC-4 sections 6.8 to 6.12 and 7.5, SBC-3 section 6.5).

Pages: 08h caching (WCE can be changed), 0Ah control, 1Ch informational exceptions.  Nothing is
saved: the pages return to their defaults with a reset.
"""

from __future__ import annotations

import struct
from typing import Final

from vhostvmbus.devices.scsi.sense import (
    PARAMETER_LIST_LENGTH,
    SAVING_NOT_SUPPORTED,
    CheckCondition,
    invalid_field,
    invalid_parameter,
)
from vhostvmbus.devices.scsi.unit import BLOCK_SIZE, LogicalUnit, Request

CACHING: Final = 0x08
CONTROL: Final = 0x0A
EXCEPTIONS: Final = 0x1C
ALL_PAGES: Final = 0x3F

_WCE: Final = 0x04
_WRITE_PROTECT: Final = 0x80
_DPOFUA: Final = 0x10


def _caching(write_cache: bool) -> bytes:
    """Returns the caching page (SBC-3 section 6.5.5), 20 bytes."""
    return bytes((CACHING, 0x12, _WCE if write_cache else 0)).ljust(20, b"\0")


def _page(code: int, unit: LogicalUnit) -> bytes:
    """Returns the page with current values."""
    if code == CACHING:
        return _caching(unit.write_cache)
    if code == CONTROL:
        # SPC-4 section 7.5.8: reordering unrestricted, fixed sense, no busy timeout.
        return struct.pack(">BBBB4xH2x", CONTROL, 0x0A, 0x00, 0x10, 0xFFFF)
    # SPC-4 section 7.5.10 (informational exceptions): DEXCPT, nothing is reported.
    return bytes((EXCEPTIONS, 0x0A, 0x08)).ljust(12, b"\0")


def _changeable(code: int, unit: LogicalUnit) -> bytes:
    """Returns the page as a mask of what MODE SELECT may change."""
    if code == CACHING:
        return _caching(True)
    page = _page(code, unit)
    return page[:2] + bytes(len(page) - 2)


def _default(code: int, unit: LogicalUnit) -> bytes:
    return _caching(True) if code == CACHING else _page(code, unit)


_BY_CONTROL = {0: _page, 1: _changeable, 2: _default}


def _pages(unit: LogicalUnit, control: int, code: int, subpage: int) -> bytes:
    if control == 3:
        raise CheckCondition(SAVING_NOT_SUPPORTED)
    # Subpage FFh means "all", and none of these pages has any.
    if subpage not in (0x00, 0xFF):
        raise invalid_field(3)
    codes = (CACHING, CONTROL, EXCEPTIONS) if code == ALL_PAGES else (code,)
    if not set(codes) <= {CACHING, CONTROL, EXCEPTIONS}:
        raise invalid_field(2, 5)
    return b"".join(_BY_CONTROL[control](each, unit) for each in codes)


def _device_specific(unit: LogicalUnit) -> int:
    return _DPOFUA | (_WRITE_PROTECT if unit.backing.read_only else 0)


def _short_descriptor(unit: LogicalUnit) -> bytes:
    """Returns a block descriptor of SBC-3 section 6.5.2.2, 8 bytes."""
    return struct.pack(">II", min(unit.blocks, 0xFFFFFFFF), BLOCK_SIZE)


def _long_descriptor(unit: LogicalUnit) -> bytes:
    """Returns a block descriptor of SBC-3 section 6.5.2.3, 16 bytes."""
    return struct.pack(">Q4xI", unit.blocks, BLOCK_SIZE)


def mode_sense_6(unit: LogicalUnit, request: Request) -> int:
    """Does MODE SENSE(6) (SPC-4 section 6.11)."""
    cdb = request.cdb
    pages = _pages(unit, cdb[2] >> 6, cdb[2] & 0x3F, cdb[3])
    descriptor = b"" if cdb[1] & 0x08 else _short_descriptor(unit)
    size = 3 + len(descriptor) + len(pages)
    head = bytes((size, 0, _device_specific(unit), len(descriptor)))
    return request.reply(head + descriptor + pages, cdb[4])


def mode_sense_10(unit: LogicalUnit, request: Request) -> int:
    """Does MODE SENSE(10) (SPC-4 section 6.12)."""
    cdb = request.cdb
    pages = _pages(unit, cdb[2] >> 6, cdb[2] & 0x3F, cdb[3])
    long = bool(cdb[1] & 0x10)
    descriptor = _long_descriptor(unit) if long else _short_descriptor(unit)
    if cdb[1] & 0x08:  # DBD: no block descriptors
        descriptor = b""
    size = 6 + len(descriptor) + len(pages)
    head = struct.pack(
        ">HBBBxH", size, 0, _device_specific(unit), int(long and bool(descriptor)), len(descriptor)
    )
    return request.reply(head + descriptor + pages, request.u16(7))


def _check_select(request: Request) -> None:
    if not request.cdb[1] & 0x10:  # PF: pages in the standard format
        raise invalid_field(1, 4)
    if request.cdb[1] & 0x01:  # SP: save
        raise invalid_field(1, 0)


def _descriptor_is_ours(unit: LogicalUnit, descriptor: bytes) -> bool:
    """Returns whether a block descriptor asks for the format that the disk has."""
    if len(descriptor) == 8:
        blocks, size = struct.unpack(">II", descriptor)
        size &= 0xFFFFFF
        limit = 0xFFFFFFFF
    else:
        blocks, size = struct.unpack(">Q4xI", descriptor)
        limit = 0xFFFFFFFFFFFFFFFF
    return size in (0, BLOCK_SIZE) and blocks in (0, limit, min(unit.blocks, limit))


def _select(
    unit: LogicalUnit, request: Request, parameters: bytes, header: int, descriptors: int
) -> None:
    """Checks the whole list, then applies it: a refused list changes nothing."""
    if len(parameters) < header + descriptors:
        raise CheckCondition(PARAMETER_LIST_LENGTH)
    if descriptors not in (0, 8, 16) or (descriptors == 16 and header == 4):
        raise invalid_parameter(header - 1)
    if descriptors and not _descriptor_is_ours(unit, parameters[header : header + descriptors]):
        raise invalid_parameter(header)
    write_cache = unit.write_cache
    at = header + descriptors
    while at < len(parameters):
        code = parameters[at] & 0x3F
        if parameters[at] & 0x40 or code not in (CACHING, CONTROL, EXCEPTIONS):
            raise invalid_parameter(at)
        current, mask = _page(code, unit), _changeable(code, unit)
        wanted = parameters[at : at + len(current)]
        if len(wanted) < len(current):
            raise CheckCondition(PARAMETER_LIST_LENGTH)
        if wanted[1] != current[1]:
            raise invalid_parameter(at + 1)
        for index in range(2, len(current)):
            if (wanted[index] ^ current[index]) & ~mask[index]:
                raise invalid_parameter(at + index)
        if code == CACHING:
            write_cache = bool(wanted[2] & _WCE)
        at += len(current)
    if write_cache == unit.write_cache:
        return
    with request.step(unit):
        unit.set_write_cache(write_cache)
    if not write_cache and not unit.backing.read_only:
        # What the cache holds must not be less durable than what follows. Flushed after the
        # switch: no write can slip in between and stay in the cache.
        try:
            unit.backing.flush()
        except OSError:
            with request.step(unit):
                unit.set_write_cache(True)
            raise


def mode_select_6(unit: LogicalUnit, request: Request) -> int:
    """Does MODE SELECT(6) (SPC-4 section 6.9)."""
    _check_select(request)
    length = request.cdb[4]
    return _take_list(unit, request, length, 4)


def mode_select_10(unit: LogicalUnit, request: Request) -> int:
    """Does MODE SELECT(10) (SPC-4 section 6.10)."""
    _check_select(request)
    return _take_list(unit, request, request.u16(7), 8)


def _take_list(unit: LogicalUnit, request: Request, length: int, header: int) -> int:
    if not length:
        return 0
    if length < header or request.room < length:
        raise CheckCondition(PARAMETER_LIST_LENGTH)
    parameters = request.data.read(0, length)
    descriptors = parameters[3] if header == 4 else int.from_bytes(parameters[6:8], "big")
    _select(unit, request, parameters, header, descriptors)
    return length
