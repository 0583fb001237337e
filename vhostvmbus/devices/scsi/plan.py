# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan for the ring engine: READ and WRITE of a disk, as the commands would do them.

A rule stands for one command of one unit in one packet layout. It fits only requests that
:mod:`~vhostvmbus.devices.scsi.session`, :mod:`~vhostvmbus.devices.scsi.commands.execute` and
:mod:`~vhostvmbus.devices.scsi.commands.transfer` would let through without a word; all others, good
or bad, are theirs. The completion is that of :meth:`Srb.answer`.

Invariants: no rule for a unit that is not ready or has a unit attention to report; none for writing
to a read-only disk or to one whose write cache is off; no rule does a command with FUA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from vhostvmbus.devices.scsi.cdb import Opcode
from vhostvmbus.devices.scsi.storvsp import EXECUTE_SRB, PACKET_SIZE, DataDirection, SrbStatus
from vhostvmbus.devices.scsi.storvsp import Operation as VstorOperation
from vhostvmbus.devices.scsi.unit import BLOCK_SIZE, Direct, DirectBacking, LogicalUnit
from vhostvmbus.ring import Number, Operation, Rule

_LENGTH, _SRB_STATUS, _PATH, _LUN, _CDB_LENGTH = 12, 14, 17, 19, 20
_SENSE_LENGTH, _DIRECTION, _RESERVED, _TRANSFER, _CDB = 21, 22, 23, 24, 28
"""Offsets in a vstor packet with a SCSI request, see :mod:`~vhostvmbus.devices.scsi.storvsp`."""
_LONG_SRB, _SHORT_SRB = 52, 36
_SHIFT: Final = BLOCK_SIZE.bit_length() - 1
_TRANSFERRED: Final = Number(_TRANSFER, 4)


class _Command(NamedTuple):
    opcode: Opcode
    cdb_length: int
    operation: Operation
    lba: Number
    blocks: Number


def _field(offset: int, width: int) -> Number:
    return Number(_CDB + offset, width, big_endian=True, shift=_SHIFT)


_COMMANDS: Final = (
    _Command(Opcode.READ_10, 10, Operation.READ, _field(2, 4), _field(7, 2)),
    _Command(Opcode.WRITE_10, 10, Operation.WRITE, _field(2, 4), _field(7, 2)),
    _Command(Opcode.READ_16, 16, Operation.READ, _field(2, 8), _field(10, 4)),
    _Command(Opcode.WRITE_16, 16, Operation.WRITE, _field(2, 8), _field(10, 4)),
)
_PROTECTION_AND_FUA: Final = 0xE8
_NACA: Final = 0x04


def rules(lun: int, unit: LogicalUnit, packet_sizes: tuple[int, ...]) -> Iterator[Rule]:
    """Yields the rules for a unit as it is now; none if every command has to be looked at."""
    backing = unit.backing
    target = backing.direct() if isinstance(backing, DirectBacking) else None
    if target is None or unit.attentions or unit.stragglers or unit.replaced:
        return
    for command in _COMMANDS:
        if command.operation is Operation.WRITE and (backing.read_only or not unit.write_cache):
            continue
        for size in packet_sizes:
            yield _rule(lun, unit, command, target, size)


def _rule(lun: int, unit: LogicalUnit, command: _Command, target: Direct, size: int) -> Rule:
    reading = command.operation is Operation.READ
    mask, value = bytearray(size), bytearray(size)

    def want(offset: int, content: bytes, bits: int = 0xFF) -> None:
        mask[offset : offset + len(content)] = bytes((bits,)) * len(content)
        value[offset : offset + len(content)] = content

    want(0, EXECUTE_SRB)
    want(_LENGTH, (_LONG_SRB if size == PACKET_SIZE else _SHORT_SRB).to_bytes(2, "little"))
    want(_PATH, bytes((0, 0, lun)))
    want(_CDB_LENGTH, bytes((command.cdb_length,)))
    want(_DIRECTION, bytes((DataDirection.READ if reading else DataDirection.WRITE,)))
    want(_CDB, bytes((command.opcode,)))
    want(_CDB + 1, b"\0", _PROTECTION_AND_FUA)
    want(_CDB + command.cdb_length - 1, b"\0", _NACA)

    keep, put = bytearray(b"\xff" * size), bytearray(size)
    for first, end in ((0, 4), (8, 12), (_SRB_STATUS, 16), (_TRANSFER, _CDB)):
        keep[first:end] = bytes(end - first)
    keep[_SENSE_LENGTH] = keep[_RESERVED] = 0
    put[0] = VstorOperation.COMPLETE_IO
    put[_SRB_STATUS] = SrbStatus.SUCCESS
    return Rule(
        operation=command.operation,
        fd=target.fd,
        file_size=target.size,
        max_length=unit.max_transfer_blocks * BLOCK_SIZE,
        payload_length=size,
        mask=bytes(mask),
        value=bytes(value),
        position=command.lba,
        length=command.blocks,
        room=_TRANSFERRED,
        keep=bytes(keep),
        set=bytes(put),
        done=_TRANSFERRED,
        nowait=reading and target.nowait,
    )
