# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk and a data buffer of plain bytes, for tests of SCSI commands without I/O."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from functools import cache

from vhostvmbus.devices.scsi.commands import Outcome, execute
from vhostvmbus.devices.scsi.unit import DataBuffer, Identity, LogicalUnit, NoData, Request

IDENTITY = Identity(serial="TEST0001", naa=bytes.fromhex("3123456789abcdef"))


class BytesBuffer:
    """A bounds-checked DataBuffer over a bytearray."""

    def __init__(self, content: bytes | int) -> None:
        self.content = bytearray(content)

    def __len__(self) -> int:
        return len(self.content)

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        end = len(self.content) if length is None else offset + length
        assert 0 <= offset <= end <= len(self.content)
        return bytes(self.content[offset:end])

    def write(self, data: bytes, offset: int = 0) -> None:
        assert 0 <= offset <= offset + len(data) <= len(self.content)
        self.content[offset : offset + len(data)] = data

    def preadv(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        end = len(self.content) if length is None else offset + length
        return os.preadv(fd, [memoryview(self.content)[offset:end]], file_offset)

    def pwritev(self, fd: int, file_offset: int, offset: int = 0, length: int | None = None) -> int:
        end = len(self.content) if length is None else offset + length
        return os.pwritev(fd, [memoryview(self.content)[offset:end]], file_offset)


@dataclass
class MemoryDisk:
    """A Backing of bytes that writes down what was asked of it."""

    content: bytearray
    read_only: bool = False
    can_discard: bool = True
    discard_zeroes: bool = True
    cold: bool = False
    """The answer of :meth:`would_wait`."""
    error: int = 0
    """The errno that every access fails with."""
    calls: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.content)

    def _note(self, name: str, offset: int = 0, length: int = 0) -> None:
        assert 0 <= offset <= offset + length <= len(self.content)
        self.calls.append((name, offset, length))
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def would_wait(self, offset: int, length: int) -> bool:
        assert 0 <= offset < offset + length <= len(self.content)
        return self.cold

    def read_into(self, data: DataBuffer, offset: int, length: int) -> None:
        self._note("read", offset, length)
        data.write(bytes(self.content[offset : offset + length]))

    def write_from(self, data: DataBuffer, offset: int, length: int) -> None:
        self._note("write", offset, length)
        assert not self.read_only
        self.content[offset : offset + length] = data.read(0, length)

    def read(self, offset: int, length: int) -> bytes:
        self._note("read", offset, length)
        return bytes(self.content[offset : offset + length])

    def write(self, offset: int, payload: bytes) -> None:
        self._note("write", offset, len(payload))
        assert not self.read_only
        self.content[offset : offset + len(payload)] = payload

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, length: int) -> None:
        self._note("discard", offset, length)
        assert not self.read_only
        self.content[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._note("unmap zeroes" if unmap else "zeroes", offset, length)
        assert not self.read_only
        self.content[offset : offset + length] = bytes(length)

    def mapped_extent(self, offset: int) -> tuple[bool, int]:
        self._note("extent", offset)
        return True, self.size - offset


@cache
def pattern(size: int, seed: int = 1) -> bytes:
    """Returns bytes without a period that a misplaced block could hide in."""
    return bytes((seed * 131 + i * 7 + (i >> 8) * 13 + (i >> 16)) & 0xFF for i in range(size))


def make_unit(blocks: int = 256, **options: object) -> tuple[LogicalUnit, MemoryDisk]:
    disk = MemoryDisk(bytearray(pattern(blocks * 512)), **options)  # type: ignore[arg-type]
    return LogicalUnit(disk, IDENTITY), disk


def run(
    unit: LogicalUnit | None,
    cdb: str | bytes,
    data: bytes | int | DataBuffer = 0,
    *,
    room: int | None = None,
    luns: tuple[int, ...] = (0,),
    cdb_length: int | None = None,
) -> tuple[Outcome, bytes]:
    """Executes a CDB (hex or bytes); returns the outcome and the buffer afterwards."""
    raw = bytes.fromhex(cdb) if isinstance(cdb, str) else cdb
    buffer = data if not isinstance(data, int | bytes) else BytesBuffer(data) if data else NoData()
    size = len(buffer) if room is None else room
    request = Request(raw.ljust(16, b"\0"), buffer, size)
    outcome = execute(unit, request, cdb_length or len(raw), list(luns))
    return outcome, buffer.read()


def code(outcome: Outcome) -> tuple[int, int, int]:
    """Returns ``(key, asc, ascq)`` of a failed command."""
    assert outcome.status == 2
    assert outcome.sense is not None
    return outcome.sense.key, outcome.sense.asc, outcome.sense.ascq


INVALID_OPCODE = (5, 0x20, 0)
INVALID_FIELD = (5, 0x24, 0)
INVALID_PARAMETER = (5, 0x26, 0)
OUT_OF_RANGE = (5, 0x21, 0)
LIST_LENGTH = (5, 0x1A, 0)
WRITE_PROTECTED = (7, 0x27, 0)
ENOSPC = errno.ENOSPC
