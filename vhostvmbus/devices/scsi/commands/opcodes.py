# SPDX-License-Identifier: GPL-2.0-or-later
"""REPORT SUPPORTED OPERATION CODES (SPC-4 section 6.36)."""

from __future__ import annotations

import struct

from vhostvmbus.devices.scsi.commands.table import BY_ACTION, BY_OPCODE, COMMANDS, Command
from vhostvmbus.devices.scsi.sense import invalid_field
from vhostvmbus.devices.scsi.unit import Request

_NO_TIMEOUTS = struct.pack(">H10x", 0x0A)
"""A command timeouts descriptor (SPC-4 section 6.36.4) that names none."""


def _all(timeouts: bool) -> bytes:
    """Returns all_commands parameter data (SPC-4 section 6.36.2)."""
    entries = b""
    for command in COMMANDS:
        flags = (0x01 if command.service_action is not None else 0) | (0x02 if timeouts else 0)
        entries += struct.pack(
            ">BxHxBH", command.opcode, command.service_action or 0, flags, command.length
        )
        if timeouts:
            entries += _NO_TIMEOUTS
    return struct.pack(">I", len(entries)) + entries


def _one(command: Command | None, timeouts: bool) -> bytes:
    """Returns one_command parameter data (SPC-4 section 6.36.3)."""
    if command is None:
        return struct.pack(">BBH", 0, 0x01, 0)
    usage = command.usage
    if command.service_action is not None:
        mask = usage[1] & 0xE0
        usage = bytes((usage[0], mask | command.service_action)) + usage[2:]
    support = 0x03 | (0x80 if timeouts else 0)
    head = struct.pack(">BBH", 0, support, len(usage))
    return head + usage + (_NO_TIMEOUTS if timeouts else b"")


def report_supported_opcodes(request: Request) -> int:
    """Reports all codes (option 0), one (1), one with a service action (2), either (3)."""
    cdb = request.cdb
    timeouts, option = bool(cdb[2] & 0x80), cdb[2] & 0x07
    opcode, action = cdb[3], request.u16(4)
    if option == 0:
        payload = _all(timeouts)
    elif option == 1:
        if opcode in BY_ACTION:
            raise invalid_field(2, 2)
        payload = _one(BY_OPCODE.get(opcode), timeouts)
    elif option == 2:
        if opcode in BY_OPCODE:
            raise invalid_field(2, 2)
        payload = _one(BY_ACTION.get(opcode, {}).get(action), timeouts)
    elif option == 3:
        command = BY_OPCODE.get(opcode) if action == 0 else None
        payload = _one(command or BY_ACTION.get(opcode, {}).get(action), timeouts)
    else:
        raise invalid_field(2, 2)
    return request.reply(payload, request.u32(6))
