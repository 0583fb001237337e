# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic SCSI controller (class ba6163d9-04a1-4d29-b605-72e2ffb1dc7f) and its disks.

From the wire inwards: :mod:`.storvsp` packets, :mod:`.session` the handshake, :mod:`.commands`
what each :mod:`.cdb` does to a :mod:`.unit`, :mod:`.sense` why it failed, :mod:`.disk` the bytes on
the host with :mod:`.locking`, and :mod:`.device` where they meet a channel.
"""

from vhostvmbus.devices.scsi.device import ScsiController
from vhostvmbus.devices.scsi.disk import DiskError, DiskSpec, FileDisk, parse_disk
from vhostvmbus.devices.scsi.locking import DiskLocked

__all__ = ["DiskError", "DiskLocked", "DiskSpec", "FileDisk", "ScsiController", "parse_disk"]
