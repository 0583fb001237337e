# SPDX-License-Identifier: GPL-2.0-or-later
"""INQUIRY and the vital product data pages (SPC-4 section 6.6 and 7.8, SBC-3 section 6.6)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from vhostvmbus.devices.scsi.sense import invalid_field
from vhostvmbus.devices.scsi.unit import BLOCKS_PER_PHYSICAL_EXPONENT, LogicalUnit, Request

MAX_UNMAP_BLOCKS: Final = 1 << 21
"""1 GiB: bounds the time that one UNMAP or WRITE SAME takes."""
MAX_UNMAP_DESCRIPTORS: Final = 256

NO_DEVICE: Final = 0x7F
"""Peripheral qualifier 3, device type 1Fh: nothing can be connected here (SPC-4 table 175)."""

_VERSION_DESCRIPTORS = (0x00A0, 0x0460, 0x04C0)  # SAM-5, SPC-4, SBC-3; no version claimed
_STANDARD = struct.Struct(">8B8s16s4s20x2x8H")


def _ascii(text: str, size: int) -> bytes:
    return text.encode("ascii", "replace")[:size].ljust(size)


def standard_data(unit: LogicalUnit | None) -> bytes:
    """Returns standard INQUIRY data, 74 bytes; with ``None``, those of a LUN without a device."""
    versions = (*_VERSION_DESCRIPTORS, 0, 0, 0, 0, 0)
    vendor, product, revision = "", "", ""
    if unit is not None:
        who = unit.identity
        vendor, product, revision = who.vendor, who.product, who.revision
    return _STANDARD.pack(
        NO_DEVICE if unit is None else 0x00,
        0x00,  # medium not removable
        0x06,  # SPC-4
        0x12,  # HISUP, response data format 2
        _STANDARD.size - 5,
        0x00,
        0x00,
        0x02,  # CMDQUE
        _ascii(vendor, 8),
        _ascii(product, 16),
        _ascii(revision, 4),
        *versions,
    )


def _supported_pages(unit: LogicalUnit) -> bytes:
    return bytes(sorted(_PAGES))


def _serial_number(unit: LogicalUnit) -> bytes:
    return unit.identity.serial.encode("ascii", "replace")[:64]


def _designators(unit: LogicalUnit) -> bytes:
    """Returns device identification (SPC-4 section 7.8.6), NAA first: hosts name disks by it."""
    who = unit.identity
    naa = struct.pack(">BBxB", 0x01, 0x03, len(who.naa)) + who.naa
    vendor = _ascii(who.vendor, 8) + _serial_number(unit)
    return naa + struct.pack(">BBxB", 0x02, 0x01, len(vendor)) + vendor


def _block_limits(unit: LogicalUnit) -> bytes:
    """Returns the page of SBC-3 section 6.6.4."""
    discard = unit.backing.can_discard
    physical = 1 << BLOCKS_PER_PHYSICAL_EXPONENT
    return struct.pack(
        ">BBHIIIIIIIQ20x",
        0x01,  # WSNZ: WRITE SAME of zero blocks is not "to the end"
        0x00,  # COMPARE AND WRITE is not supported
        physical,  # optimal transfer length granularity
        unit.max_transfer_blocks,
        0,  # no optimal transfer length
        0,  # no prefetch limit
        MAX_UNMAP_BLOCKS if discard else 0,
        MAX_UNMAP_DESCRIPTORS if discard else 0,
        physical if discard else 0,  # optimal unmap granularity
        0x80000000 if discard else 0,  # UGAVALID, alignment 0
        MAX_UNMAP_BLOCKS,  # maximum WRITE SAME length
    )


def _characteristics(unit: LogicalUnit) -> bytes:
    """Returns the page of SBC-3 section 6.6.3: no rotating medium."""
    return struct.pack(">HBB56x", 0x0001, 0x00, 0x00)


def _provisioning(unit: LogicalUnit) -> bytes:
    """Returns the page of SBC-3 section 6.6.5: thin, UNMAP and both WRITE SAME, no anchors."""
    if not unit.backing.can_discard:
        return bytes(4)
    zeroes = 0x04 if unit.backing.discard_zeroes else 0
    return bytes((0, 0xE0 | zeroes, 0x02, 0))


_PAGES: Final[dict[int, Callable[[LogicalUnit], bytes]]] = {
    0x00: _supported_pages,
    0x80: _serial_number,
    0x83: _designators,
    0xB0: _block_limits,
    0xB1: _characteristics,
    0xB2: _provisioning,
}


def inquiry(unit: LogicalUnit, request: Request) -> int:
    """Does INQUIRY (SPC-4 section 6.6)."""
    page, allocation = request.cdb[2], request.u16(3)
    if not request.cdb[1] & 0x01:
        if page:
            raise invalid_field(2)
        return request.reply(standard_data(unit), allocation)
    build = _PAGES.get(page)
    if build is None:
        raise invalid_field(2)
    body = build(unit)
    return request.reply(struct.pack(">BBH", 0x00, page, len(body)) + body, allocation)


def inquiry_nothing(request: Request) -> int:
    """Does INQUIRY to a LUN where nothing is, with data that say so (SPC-4 section 6.6.2)."""
    if request.cdb[1] & 0x01 or request.cdb[2]:
        raise invalid_field(1, 0)
    return request.reply(standard_data(None), request.u16(3))
