# SPDX-License-Identifier: GPL-2.0-or-later
"""A controller that never says that its guest is ready to lose it, but amid a channel's end."""

import contextlib
import threading

from vhostvmbus.device import Channel, OfferRefused
from vhostvmbus.devices.scsi import ScsiController


class NeverReady(ScsiController):
    """Waits until its channels are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gone = threading.Event()
        self.unplugging = False

    def opened(self, channel: Channel) -> None:
        """A guest has it."""
        self.gone.clear()
        self.unplugging = False
        super().opened(channel)

    def suspended(self, channel: Channel) -> None:
        """The front end waits until the channel is closed, and is asked for the device then."""
        super().suspended(channel)
        if self.unplugging:
            with contextlib.suppress(OfferRefused):  # there is no front end any more
                self.offers.let_go()

    def closed(self, channel: Channel) -> None:
        """No guest has it any more."""
        super().closed(channel)
        self.gone.set()

    def unplug_requested(self) -> None:
        """Never ready."""
        self.unplugging = True
        self.gone.wait(600)
