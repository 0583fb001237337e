# SPDX-License-Identifier: GPL-2.0-or-later
"""Every supported command: operation code, service action, handler, CDB usage map, properties.

The usage maps are what REPORT SUPPORTED OPERATION CODES tells (SPC-4 section 6.36.3): a bit is
one where the command looks at the CDB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vhostvmbus.devices.scsi.commands import inquiry, mode, provision, status, transfer
from vhostvmbus.devices.scsi.unit import LogicalUnit, Request

Handler = Callable[[LogicalUnit, Request], int]
"""Carries a command out; returns the data bytes transferred, or raises CheckCondition."""

IN: Final = 1
OUT: Final = 0
NONE: Final = 2
"""Data directions, with the values of ``vmscsi_request.data_in``."""


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table."""

    name: str
    usage: bytes
    """CDB usage map, as long as the CDB; byte 0 is the operation code."""
    direction: int
    handler: Handler | None
    """``None`` for what needs the target, not a unit: REPORT LUNS and the operation codes."""
    service_action: int | None = None
    medium: bool = False
    """Needs a started unit."""
    despite_attention: bool = False
    """Carried out although a unit attention is pending (SAM-5 section 5.14)."""
    slow: bool = False
    """May take long enough that it should not hold up a channel."""

    @property
    def opcode(self) -> int:
        """Operation code, byte 0 of the CDB."""
        return self.usage[0]

    @property
    def length(self) -> int:
        """Bytes of the CDB."""
        return len(self.usage)


def _usage(opcode: int, rest: str) -> bytes:
    return bytes((opcode,)) + bytes.fromhex(rest)


_RW10 = "faffffffff00ffff00"
_WV10 = "f2ffffffff00ffff00"
_VF10 = "f6ffffffff00ffff00"
_RW12 = "faffffffffffffffff0000"
_WV12 = "f2ffffffffffffffff0000"
_VF12 = "f6ffffffffffffffff0000"
_RW16 = "faffffffffffffffffffffffff0000"
_WV16 = "f2ffffffffffffffffffffffff0000"
_VF16 = "f6ffffffffffffffffffffffff0000"

COMMANDS: Final[tuple[Command, ...]] = (
    Command(
        "TEST UNIT READY", _usage(0x00, "0000000000"), NONE, status.test_unit_ready, medium=True
    ),
    Command(
        "REQUEST SENSE",
        _usage(0x03, "010000ff00"),
        IN,
        status.request_sense,
        despite_attention=True,
    ),
    Command("READ(6)", _usage(0x08, "1fffffff00"), IN, transfer.read, medium=True),
    Command("WRITE(6)", _usage(0x0A, "1fffffff00"), OUT, transfer.write, medium=True),
    Command("INQUIRY", _usage(0x12, "01ffffff00"), IN, inquiry.inquiry, despite_attention=True),
    Command("MODE SELECT(6)", _usage(0x15, "110000ff00"), OUT, mode.mode_select_6, slow=True),
    Command("MODE SENSE(6)", _usage(0x1A, "08ffffff00"), IN, mode.mode_sense_6),
    Command("START STOP UNIT", _usage(0x1B, "010000f700"), NONE, status.start_stop_unit, slow=True),
    Command("PREVENT ALLOW MEDIUM REMOVAL", _usage(0x1E, "0000000300"), NONE, status.prevent_allow),
    Command(
        "READ CAPACITY(10)",
        _usage(0x25, "00ffffffff00000100"),
        IN,
        status.read_capacity_10,
        medium=True,
    ),
    Command("READ(10)", _usage(0x28, _RW10), IN, transfer.read, medium=True),
    Command("WRITE(10)", _usage(0x2A, _RW10), OUT, transfer.write, medium=True),
    Command(
        "WRITE AND VERIFY(10)",
        _usage(0x2E, _WV10),
        OUT,
        transfer.write_and_verify,
        medium=True,
        slow=True,
    ),
    Command("VERIFY(10)", _usage(0x2F, _VF10), OUT, transfer.verify, medium=True, slow=True),
    Command(
        "SYNCHRONIZE CACHE(10)",
        _usage(0x35, "02ffffffff00ffff00"),
        NONE,
        transfer.synchronize_cache,
        medium=True,
        slow=True,
    ),
    Command(
        "WRITE SAME(10)",
        _usage(0x41, "f8ffffffff00ffff00"),
        OUT,
        provision.write_same,
        medium=True,
        slow=True,
    ),
    Command(
        "UNMAP", _usage(0x42, "010000000000ffff00"), OUT, provision.unmap, medium=True, slow=True
    ),
    Command(
        "MODE SELECT(10)", _usage(0x55, "110000000000ffff00"), OUT, mode.mode_select_10, slow=True
    ),
    Command("MODE SENSE(10)", _usage(0x5A, "18ffff000000ffff00"), IN, mode.mode_sense_10),
    Command("READ(16)", _usage(0x88, _RW16), IN, transfer.read, medium=True),
    Command("WRITE(16)", _usage(0x8A, _RW16), OUT, transfer.write, medium=True),
    Command(
        "WRITE AND VERIFY(16)",
        _usage(0x8E, _WV16),
        OUT,
        transfer.write_and_verify,
        medium=True,
        slow=True,
    ),
    Command("VERIFY(16)", _usage(0x8F, _VF16), OUT, transfer.verify, medium=True, slow=True),
    Command(
        "SYNCHRONIZE CACHE(16)",
        _usage(0x91, "02ffffffffffffffffffffffff0000"),
        NONE,
        transfer.synchronize_cache,
        medium=True,
        slow=True,
    ),
    Command(
        "WRITE SAME(16)",
        _usage(0x93, "f9ffffffffffffffffffffffff0000"),
        OUT,
        provision.write_same,
        medium=True,
        slow=True,
    ),
    Command(
        "READ CAPACITY(16)",
        _usage(0x9E, "100000000000000000ffffffff0000"),
        IN,
        status.read_capacity_16,
        service_action=0x10,
        medium=True,
    ),
    Command(
        "GET LBA STATUS",
        _usage(0x9E, "12ffffffffffffffffffffffff0000"),
        IN,
        status.get_lba_status,
        service_action=0x12,
        medium=True,
    ),
    Command(
        "REPORT LUNS", _usage(0xA0, "00ff000000ffffffff0000"), IN, None, despite_attention=True
    ),
    Command(
        "REPORT SUPPORTED OPERATION CODES",
        _usage(0xA3, "0c87ffffffffffffff0000"),
        IN,
        None,
        service_action=0x0C,
    ),
    Command("READ(12)", _usage(0xA8, _RW12), IN, transfer.read, medium=True),
    Command("WRITE(12)", _usage(0xAA, _RW12), OUT, transfer.write, medium=True),
    Command(
        "WRITE AND VERIFY(12)",
        _usage(0xAE, _WV12),
        OUT,
        transfer.write_and_verify,
        medium=True,
        slow=True,
    ),
    Command("VERIFY(12)", _usage(0xAF, _VF12), OUT, transfer.verify, medium=True, slow=True),
)

BY_OPCODE: Final[dict[int, Command]] = {
    command.opcode: command for command in COMMANDS if command.service_action is None
}
"""Commands without a service action."""

BY_ACTION: Final[dict[int, dict[int, Command]]] = {}
"""Commands with one, by operation code and then service action."""
for _command in COMMANDS:
    if _command.service_action is not None:
        BY_ACTION.setdefault(_command.opcode, {})[_command.service_action] = _command
