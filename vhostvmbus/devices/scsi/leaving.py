# SPDX-License-Identifier: GPL-2.0-or-later
"""A controller that is being unplugged: the guest removes its disks before the controller goes.

Linux waits for the completion of every request, but takes none any more once the controller is
rescinded, and on removing a disk it has the write cache flushed. So while everything still works
the guest is told that the disks are gone, in the way in which it learns of one that was detached:
it looks again (ENUMERATE_BUS) and finds no unit. Only what looks for units finds none; whatever
the guest has still to write, it can.

Patience is counted in time in which the guest can act: a machine that is stopped in the middle uses
none of it, and goes on where it was.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from vhostvmbus.channel import Channel
from vhostvmbus.device import GuestClock, wait_until_quiet
from vhostvmbus.devices.scsi.cdb import Opcode

log = logging.getLogger(__name__)

_LOOKING: Final = frozenset({Opcode.TEST_UNIT_READY, Opcode.INQUIRY, Opcode.REPORT_LUNS})
"""The commands by which a guest finds out which units there are."""
_FLUSHING: Final = frozenset({Opcode.SYNCHRONIZE_CACHE_10, Opcode.SYNCHRONIZE_CACHE_16})
LOOK_SECONDS: Final = 3.0
"""The seconds that a guest may take until it looks at the next of the disks that it had."""
AGAIN_SECONDS: Final = 1.0
"""The seconds after which a guest that does not look is told once more: whether it takes that shows
whether it runs."""
CALM_SECONDS: Final = 1.0
"""The seconds without a command after which the guest is done: it may pause between its look and
the last flush."""
PATIENCE_SECONDS: Final = 5.0
"""After that the controller is taken all the same."""
_POLL_SECONDS: Final = 0.02


class Leaving:
    """A controller on its way out, and what its guest knows of that. Thread-safe."""

    def __init__(self) -> None:
        self.active = False
        self._unaware: set[int] = set()
        self._unflushed: set[int] = set()
        self._looked = threading.Event()

    def begin(self, luns: Iterable[int]) -> None:
        """Hides the units from now on; the guest has had those at ``luns``."""
        self._unaware = set(luns)
        self._unflushed = set(self._unaware)
        self._looked.clear()
        self.active = True
        self._look(-1)

    def end(self) -> None:
        """Shows the units again: the channel was closed, or opened anew."""
        self.active = False
        self._looked.set()

    def hides(self, lun: int, opcode: int) -> bool:
        """Returns whether a command finds no unit at this LUN."""
        if not self.active:
            return False
        if opcode in _FLUSHING and lun not in self._unaware:
            self._unflushed.discard(lun)
        if opcode not in _LOOKING:
            return False
        if opcode == Opcode.TEST_UNIT_READY:
            self._look(lun)
        return True

    def _look(self, lun: int) -> None:
        self._unaware.discard(lun)
        if not self._unaware:
            self._looked.set()

    def wait(
        self, name: str, channels: Callable[[], Sequence[Channel]], announce: Callable[[], None]
    ) -> None:
        """Waits until the guest has removed its disks or closed the channels.

        That is not for ever, if the guest runs. ``announce`` tells it to look, and has done so.
        """
        clock = GuestClock(channels)
        self._wait_for_looks(name, clock, announce)
        begin = clock()
        while True:
            left = PATIENCE_SECONDS - (clock() - begin)
            if not wait_until_quiet(channels, 0.0, left, calm=CALM_SECONDS, clock=clock):
                if channels():
                    log.warning("%s: the guest's driver does not come to rest", name)
                return
            if not self._unflushed:
                return
            # Has it no more to do, or was it stopped before it did it? If it takes this, it runs.
            self._unflushed.clear()
            announce()

    def _wait_for_looks(self, name: str, clock: GuestClock, announce: Callable[[], None]) -> None:
        since = announced = clock()
        unaware = len(self._unaware)
        while not self._looked.wait(_POLL_SECONDS):
            now = clock()
            if len(self._unaware) != unaware:
                since, unaware = now, len(self._unaware)
            if now - since >= LOOK_SECONDS:
                log.warning("%s: the guest does not look whether its disks are there", name)
                return
            if now - max(since, announced) >= AGAIN_SECONDS:
                announce()
                announced = clock()
