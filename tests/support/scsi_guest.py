# SPDX-License-Identifier: GPL-2.0-or-later
"""A SCSI controller with a disk, and a guest whose driver is bound to it."""

from __future__ import annotations

import random
from pathlib import Path

from vhostvmbus.devices.scsi import ScsiController
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.guest.storvsc import Storvsc

MIB = 1 << 20


def make_image(folder: Path) -> Path:
    """Writes 8 MiB of random bytes, the same each time."""
    path = folder / "disk.raw"
    path.write_bytes(random.Random(7).randbytes(8 * MIB))
    return path


class Rig:
    """A ``controller`` that serves ``image`` to ``guest``, whose driver has negotiated."""

    def __init__(
        self,
        image: Path,
        controller: ScsiController,
        guest: SoftwareGuest,
        ring_pages: tuple[int, int] = (33, 33),
    ) -> None:
        self.image = image
        self.controller = controller
        self.guest = guest
        self.channel = guest.enable(ring_pages=ring_pages)
        self.driver = Storvsc(guest, self.channel)
        self.driver.initialize()
