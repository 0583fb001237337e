# SPDX-License-Identifier: GPL-2.0-or-later
"""Dispatch: one CDB to one unit, whatever the bytes.

Order of the checks (SAM-5 section 5.14, SPC-4 section 4.2): operation code, unit attention,
length of the CDB, NACA, whether it is ready, then the command's own.  Invariant: :func:`execute`
never raises for anything that a guest can send, nor for an error of the host's file, as long as the
request's channel is open.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from enum import IntEnum

from vhostvmbus.devices.scsi.cdb import Opcode
from vhostvmbus.devices.scsi.commands import table, transfer
from vhostvmbus.devices.scsi.commands.inquiry import inquiry_nothing
from vhostvmbus.devices.scsi.commands.opcodes import report_supported_opcodes
from vhostvmbus.devices.scsi.commands.status import report_luns
from vhostvmbus.devices.scsi.commands.table import Command
from vhostvmbus.devices.scsi.sense import (
    BECOMING_READY,
    INVALID_OPCODE,
    LOGICAL_UNIT_NOT_SUPPORTED,
    MEDIUM_NOT_PRESENT,
    CheckCondition,
    Sense,
    from_os_error,
    invalid_field,
)
from vhostvmbus.devices.scsi.unit import LogicalUnit, Request

_log = logging.getLogger(__name__)


class Status(IntEnum):
    """SCSI status codes (SAM-5 section 5.3)."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02


@dataclass(slots=True)
class Outcome:
    """The outcome of a command."""

    status: Status
    transferred: int = 0
    """Data bytes that were moved."""
    sense: Sense | None = None
    no_unit: bool = False
    """There is no such logical unit."""

    @classmethod
    def failed(cls, sense: Sense) -> Outcome:
        """Returns CHECK CONDITION with ``sense``."""
        return cls(Status.CHECK_CONDITION, sense=sense)


NO_UNIT = Outcome(Status.GOOD, no_unit=True)


def find(cdb: bytes) -> Command | None:
    """Returns the table's row for a CDB of 16 bytes, if there is one."""
    command = table.BY_OPCODE.get(cdb[0])
    if command is None:
        actions = table.BY_ACTION.get(cdb[0])
        if actions is not None:
            return actions.get(cdb[1] & 0x1F)
    return command


def is_slow(unit: LogicalUnit, cdb: bytes) -> bool:
    """Returns whether a command may sleep for long: flushes, allocation, large verifications.

    A WRITE is slow when it has to be durable (FUA, or no write cache), a READ when the host has
    to fetch the data first.
    """
    command = find(cdb)
    if command is None or command.slow:
        return command is not None
    if command.handler is transfer.read:
        return transfer.read_would_wait(unit, cdb)
    if command.handler is transfer.write:
        return transfer.must_be_durable(unit, cdb)
    return False


def _unknown(cdb: bytes) -> CheckCondition:
    if cdb[0] in table.BY_ACTION:
        return invalid_field(1, 4)
    return CheckCondition(INVALID_OPCODE)


def _check(unit: LogicalUnit, command: Command, cdb: bytes, cdb_length: int) -> None:
    if unit.attentions and not command.despite_attention:
        attention = unit.take_attention()
        if attention.key:
            raise CheckCondition(attention)
    if cdb_length < command.length:
        raise invalid_field(cdb_length)
    if cdb[command.length - 1] & 0x04:  # NACA
        raise invalid_field(command.length - 1, 2)
    if unit.replaced and command.medium:
        raise CheckCondition(MEDIUM_NOT_PRESENT)
    if unit.stragglers and command.medium:
        raise CheckCondition(BECOMING_READY)


def execute(
    unit: LogicalUnit | None, request: Request, cdb_length: int, luns: list[int]
) -> Outcome:
    """Carries out a command.

    ``unit`` is ``None`` where no logical unit is; ``luns`` are those of the addressed target,
    in ascending order.  ``cdb_length`` is what the guest says, 1 to 16 bytes.  Raises
    :exc:`~vhostvmbus.devices.scsi.lease.Cancelled` if the request's channel closed meanwhile.
    """
    request.lease.check()
    cdb = request.cdb
    command = find(cdb)
    try:
        if unit is None:
            return _without_unit(request, command, luns)
        if command is None:
            raise _unknown(cdb)
        _check(unit, command, cdb, cdb_length)
        if command.handler is not None:
            return Outcome(Status.GOOD, command.handler(unit, request))
        if command.opcode == Opcode.REPORT_LUNS:
            return Outcome(Status.GOOD, report_luns(luns, request))
        return Outcome(Status.GOOD, report_supported_opcodes(request))
    except CheckCondition as error:
        return Outcome.failed(error.sense)
    except OSError as error:
        writing = command is not None and command.direction != table.IN
        _log.warning("%s: %s", command.name if command else "command", error)
        return Outcome.failed(from_os_error(error, writing=writing))


def _without_unit(request: Request, command: Command | None, luns: list[int]) -> Outcome:
    """Answers for an address without a logical unit (SPC-4 section 4.5.1)."""
    opcode = command.opcode if command is not None else None
    if opcode == Opcode.INQUIRY:
        return Outcome(Status.GOOD, inquiry_nothing(request))
    if opcode == Opcode.REPORT_LUNS:
        return Outcome(Status.GOOD, report_luns(luns, request))
    if opcode == Opcode.REQUEST_SENSE:
        descriptor = bool(request.cdb[1] & 0x01)
        sense = LOGICAL_UNIT_NOT_SUPPORTED
        payload = sense.descriptor() if descriptor else sense.fixed()
        return Outcome(Status.GOOD, request.reply(payload, request.cdb[4]))
    return NO_UNIT
