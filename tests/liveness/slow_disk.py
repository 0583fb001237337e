# SPDX-License-Identifier: GPL-2.0-or-later
"""A disk that takes its time: how long each access to the image takes, its address says.

The first quarter of the image is as quick as the file; in the second everything takes a moment, in
the third it is slow, and in the last it waits until the harness lets it go. So whoever sends the
commands says how long each part of them takes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from tests.liveness.unruly import NAP, Gate, Program
from vhostvmbus.devices.scsi import ScsiController
from vhostvmbus.devices.scsi.disk import FileDisk
from vhostvmbus.devices.scsi.unit import DataBuffer, Direct

IMAGE = 1 << 20
"""Bytes of the image."""


class SlowDisk(FileDisk):
    """The disk; ``planned`` says whether the engine may do some commands by itself."""

    def __init__(self, path: str, gate: Gate, slowness: float, planned: bool) -> None:
        self._gate = gate
        self._slowness = slowness
        self._planned = planned
        super().__init__(path)

    @contextlib.contextmanager
    def _held_up(self, what: str, offset: int) -> Iterator[None]:
        match offset * 4 // IMAGE:
            case 0:
                yield
            case 1:
                time.sleep(NAP)
                yield
            case 2:
                time.sleep(self._slowness)
                yield
            case _:
                program = Program(None, f"{what} at {offset:#x}", [], None, None)
                self._gate.wait(program)
                try:
                    yield
                finally:
                    self._gate.ended(program)

    def direct(self) -> Direct | None:
        return super().direct() if self._planned else None

    def read_into(self, data: DataBuffer, offset: int, length: int) -> None:
        with self._held_up("read", offset):
            super().read_into(data, offset, length)

    def write_from(self, data: DataBuffer, offset: int, length: int) -> None:
        with self._held_up("write", offset):
            super().write_from(data, offset, length)

    def write(self, offset: int, payload: bytes) -> None:
        with self._held_up("write of its own", offset):
            super().write(offset, payload)

    def discard(self, offset: int, length: int) -> None:
        with self._held_up("discard", offset):
            super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        with self._held_up("zeroes", offset):
            super().write_zeroes(offset, length, unmap=unmap)

    def flush(self) -> None:
        time.sleep(self._slowness)
        super().flush()


def slow_controller(path: str, slowness: float, planned: bool) -> tuple[ScsiController, Gate]:
    """Returns a controller with such a disk, and the gate where its accesses wait."""
    gate = Gate()
    return ScsiController([SlowDisk(path, gate, slowness, planned)]), gate
