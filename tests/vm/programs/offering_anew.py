# SPDX-License-Identifier: GPL-2.0-or-later
"""A device with three channels, which is rescinded and offered anew at each SIGUSR1."""

import signal
import threading
from uuid import UUID

from vhostvmbus.device import Device


class OfferingAnew(Device):
    """It takes no packets."""

    class_id = UUID("0a4e2f2f-6b1f-4d9b-8f0e-0f2d9c7b5a11")
    channels = 3
    max_channels = 3

    def __init__(self) -> None:
        signal.signal(
            signal.SIGUSR1, lambda number, frame: threading.Thread(target=self._anew).start()
        )

    def _anew(self) -> None:
        self.rescind()
        self.offer_again()
