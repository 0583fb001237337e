# SPDX-License-Identifier: GPL-2.0-or-later
"""Has a device stand still while its guest's machine does: VMBUS_SUSPEND and VMBUS_CONTINUE.

docs/vhost-user-vmbus.md, *A machine that is stopped*. What was taken from the rings is completed,
then nothing goes into them any more; what a device sends meanwhile waits. Invariant: the device
hears ``machine_stopped`` and ``machine_continued`` in turn.
"""

import logging
from collections.abc import Callable, Collection

from vhostvmbus.channel import Channel
from vhostvmbus.channel.deadline import Deadline, LeftBehind
from vhostvmbus.device.device import Device
from vhostvmbus.wire.errors import DeviceTimeout, NotStill

log = logging.getLogger(__name__)

SUSPEND_SECONDS = 4.0
"""The seconds in which packets are to complete when the machine stops."""
CALLBACK_SECONDS = 1.0
"""The seconds that the device's own part may take, besides."""


class Stillness:
    """Has one device stand still, and go on. Its caller takes turns."""

    def __init__(self, name: str, device: Device, left: LeftBehind) -> None:
        self._name = name
        self._device = device
        self._left = left
        self.suspended = False
        """Tells whether the machine stands still, as far as the front end has said."""

    def begin(self, channels: Collection[Channel]) -> None:
        """Holds these channels, for VMBUS_SUSPEND; a second time it holds those that are new.

        Raises :exc:`NotStill` if packets are not completed in time, or the device's part does not
        return. They are held all the same.
        """
        deadline = Deadline(SUSPEND_SECONDS)
        for channel in channels:
            channel.standstill.begin()
        busy = [channel for channel in channels if not channel.standstill.wait(deadline)]
        told = True
        if not self.suspended:
            self.suspended = True
            told = self._tell("machine_stopped", self._device.machine_stopped)
        last = Deadline(CALLBACK_SECONDS)
        sending = [channel for channel in channels if not channel.standstill.keep_back(last)]
        if busy:
            packets = sum(channel.outstanding for channel in busy)
            names = ", ".join(channel.name for channel in busy)
            raise NotStill(f"{packets} packets of {names} are not completed")
        if sending:
            names = ", ".join(channel.name for channel in sending)
            raise NotStill(f"somebody who sends on {names} does not return")
        if not told:
            raise NotStill("machine_stopped() did not return, or failed")

    def end(self, channels: Collection[Channel]) -> None:
        """Lets these channels go on, for VMBUS_CONTINUE; does nothing unless they are held."""
        if not self.suspended:
            return
        self.suspended = False
        self._tell("machine_continued", self._device.machine_continued)
        for channel in channels:
            channel.standstill.end()

    def _tell(self, name: str, callback: Callable[[], None]) -> bool:
        """Calls one of the device's callbacks. Returns whether it has returned."""
        try:
            self._left.call(f"{self._name} {name}", callback, Deadline(CALLBACK_SECONDS)).get()
        except DeviceTimeout as error:
            log.error("%s: %s", self._name, error)
        except BaseException:
            log.exception("%s: %s() failed", self._name, name)
        else:
            return True
        return False
