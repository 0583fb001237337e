# SPDX-License-Identifier: GPL-2.0-or-later
"""Every supported command: operation code, service action, handler, CDB usage map, properties.

The usage maps are what REPORT SUPPORTED OPERATION CODES tells (SPC-4 section 6.36.3): a bit is
one where the command looks at the CDB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vhostvmbus.devices.scsi.cdb import Opcode
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
    """Needs a unit that is ready."""
    despite_attention: bool = False
    """Carried out although a unit attention is pending (SAM-5 section 5.14)."""
    slow: bool = False
    """May take long enough that it should not hold up a channel."""

    @property
    def opcode(self) -> Opcode:
        """The operation code, byte 0 of the CDB."""
        return Opcode(self.usage[0])

    @property
    def length(self) -> int:
        """The length of the CDB in bytes."""
        return len(self.usage)


def _usage(opcode: Opcode, rest: str) -> bytes:
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
        "TEST UNIT READY",
        _usage(Opcode.TEST_UNIT_READY, "0000000000"),
        NONE,
        status.test_unit_ready,
        medium=True,
    ),
    Command(
        "REQUEST SENSE",
        _usage(Opcode.REQUEST_SENSE, "010000ff00"),
        IN,
        status.request_sense,
        despite_attention=True,
    ),
    Command("READ(6)", _usage(Opcode.READ_6, "1fffffff00"), IN, transfer.read, medium=True),
    Command("WRITE(6)", _usage(Opcode.WRITE_6, "1fffffff00"), OUT, transfer.write, medium=True),
    Command(
        "INQUIRY", _usage(Opcode.INQUIRY, "01ffffff00"), IN, inquiry.inquiry, despite_attention=True
    ),
    Command(
        "MODE SELECT(6)",
        _usage(Opcode.MODE_SELECT_6, "110000ff00"),
        OUT,
        mode.mode_select_6,
        slow=True,
    ),
    Command("MODE SENSE(6)", _usage(Opcode.MODE_SENSE_6, "08ffffff00"), IN, mode.mode_sense_6),
    Command(
        "START STOP UNIT",
        _usage(Opcode.START_STOP_UNIT, "010000f700"),
        NONE,
        status.start_stop_unit,
        slow=True,
    ),
    Command(
        "PREVENT ALLOW MEDIUM REMOVAL",
        _usage(Opcode.PREVENT_ALLOW_MEDIUM_REMOVAL, "0000000300"),
        NONE,
        status.prevent_allow,
    ),
    Command(
        "READ CAPACITY(10)",
        _usage(Opcode.READ_CAPACITY_10, "00ffffffff00000100"),
        IN,
        status.read_capacity_10,
        medium=True,
    ),
    Command("READ(10)", _usage(Opcode.READ_10, _RW10), IN, transfer.read, medium=True),
    Command("WRITE(10)", _usage(Opcode.WRITE_10, _RW10), OUT, transfer.write, medium=True),
    Command(
        "WRITE AND VERIFY(10)",
        _usage(Opcode.WRITE_AND_VERIFY_10, _WV10),
        OUT,
        transfer.write_and_verify,
        medium=True,
        slow=True,
    ),
    Command(
        "VERIFY(10)", _usage(Opcode.VERIFY_10, _VF10), OUT, transfer.verify, medium=True, slow=True
    ),
    Command(
        "SYNCHRONIZE CACHE(10)",
        _usage(Opcode.SYNCHRONIZE_CACHE_10, "02ffffffff00ffff00"),
        NONE,
        transfer.synchronize_cache,
        medium=True,
        slow=True,
    ),
    Command(
        "WRITE SAME(10)",
        _usage(Opcode.WRITE_SAME_10, "f8ffffffff00ffff00"),
        OUT,
        provision.write_same,
        medium=True,
        slow=True,
    ),
    Command(
        "UNMAP",
        _usage(Opcode.UNMAP, "010000000000ffff00"),
        OUT,
        provision.unmap,
        medium=True,
        slow=True,
    ),
    Command(
        "MODE SELECT(10)",
        _usage(Opcode.MODE_SELECT_10, "110000000000ffff00"),
        OUT,
        mode.mode_select_10,
        slow=True,
    ),
    Command(
        "MODE SENSE(10)", _usage(Opcode.MODE_SENSE_10, "18ffff000000ffff00"), IN, mode.mode_sense_10
    ),
    Command("READ(16)", _usage(Opcode.READ_16, _RW16), IN, transfer.read, medium=True),
    Command("WRITE(16)", _usage(Opcode.WRITE_16, _RW16), OUT, transfer.write, medium=True),
    Command(
        "WRITE AND VERIFY(16)",
        _usage(Opcode.WRITE_AND_VERIFY_16, _WV16),
        OUT,
        transfer.write_and_verify,
        medium=True,
        slow=True,
    ),
    Command(
        "VERIFY(16)", _usage(Opcode.VERIFY_16, _VF16), OUT, transfer.verify, medium=True, slow=True
    ),
    Command(
        "SYNCHRONIZE CACHE(16)",
        _usage(Opcode.SYNCHRONIZE_CACHE_16, "02ffffffffffffffffffffffff0000"),
        NONE,
        transfer.synchronize_cache,
        medium=True,
        slow=True,
    ),
    Command(
        "WRITE SAME(16)",
        _usage(Opcode.WRITE_SAME_16, "f9ffffffffffffffffffffffff0000"),
        OUT,
        provision.write_same,
        medium=True,
        slow=True,
    ),
    Command(
        "READ CAPACITY(16)",
        _usage(Opcode.SERVICE_ACTION_IN_16, "100000000000000000ffffffff0000"),
        IN,
        status.read_capacity_16,
        service_action=0x10,
        medium=True,
    ),
    Command(
        "GET LBA STATUS",
        _usage(Opcode.SERVICE_ACTION_IN_16, "12ffffffffffffffffffffffff0000"),
        IN,
        status.get_lba_status,
        service_action=0x12,
        medium=True,
    ),
    Command(
        "REPORT LUNS",
        _usage(Opcode.REPORT_LUNS, "00ff000000ffffffff0000"),
        IN,
        None,
        despite_attention=True,
    ),
    Command(
        "REPORT SUPPORTED OPERATION CODES",
        _usage(Opcode.MAINTENANCE_IN, "0c87ffffffffffffff0000"),
        IN,
        None,
        service_action=0x0C,
    ),
    Command("READ(12)", _usage(Opcode.READ_12, _RW12), IN, transfer.read, medium=True),
    Command("WRITE(12)", _usage(Opcode.WRITE_12, _RW12), OUT, transfer.write, medium=True),
    Command(
        "WRITE AND VERIFY(12)",
        _usage(Opcode.WRITE_AND_VERIFY_12, _WV12),
        OUT,
        transfer.write_and_verify,
        medium=True,
        slow=True,
    ),
    Command(
        "VERIFY(12)", _usage(Opcode.VERIFY_12, _VF12), OUT, transfer.verify, medium=True, slow=True
    ),
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
