# SPDX-License-Identifier: GPL-2.0-or-later
"""A controller that is being unplugged: the guest removes its disks before the controller goes.

Linux waits for the completion of every request, but takes none any more once the controller is
rescinded, and on removing a disk it has the write cache flushed. So while everything still works
the guest is told that the disks are gone, in the way in which it learns of one that was detached:
it looks again (ENUMERATE_BUS) and finds no unit. Only what looks for units finds none; whatever
the guest has still to write, it can.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from vhostvmbus.channel import Channel
from vhostvmbus.device import wait_until_quiet
from vhostvmbus.devices.scsi.cdb import Opcode

log = logging.getLogger(__name__)

_LOOKING: Final = frozenset({Opcode.TEST_UNIT_READY, Opcode.INQUIRY, Opcode.REPORT_LUNS})
"""The commands by which a guest finds out which units there are."""
LOOK_SECONDS: Final = 3.0
"""The seconds that a guest may take to look at every disk that it had."""
CALM_SECONDS: Final = 1.0
"""The seconds without a command after which the guest is done: it may pause between its look and
the last flush."""
PATIENCE_SECONDS: Final = 5.0
"""After that the controller is taken all the same."""


class Leaving:
    """A controller on its way out, and what its guest knows of that. Thread-safe."""

    def __init__(self) -> None:
        self.active = False
        self._unaware: set[int] = set()
        self._looked = threading.Event()

    def begin(self, luns: Iterable[int]) -> None:
        """Hides the units from now on; the guest has had those at ``luns``."""
        self._unaware = set(luns)
        self._looked.clear()
        self.active = True
        self._look(-1)

    def end(self) -> None:
        """Shows the units again: the channel was closed, or opened anew."""
        self.active = False
        self._looked.set()

    def hides(self, lun: int, opcode: int) -> bool:
        """Returns whether a command finds no unit at this LUN."""
        if not self.active or opcode not in _LOOKING:
            return False
        if opcode == Opcode.TEST_UNIT_READY:
            self._look(lun)
        return True

    def _look(self, lun: int) -> None:
        self._unaware.discard(lun)
        if not self._unaware:
            self._looked.set()

    def wait(self, name: str, channels: Callable[[], Sequence[Channel]]) -> None:
        """Waits until the guest has removed its disks or closed the channels; not for ever."""
        if not self._looked.wait(LOOK_SECONDS):
            log.warning("%s: the guest does not look whether its disks are there", name)
        quiet = wait_until_quiet(channels, 0.0, PATIENCE_SECONDS, calm=CALM_SECONDS)
        if not quiet and channels():
            log.warning("%s: the guest's driver does not come to rest", name)
