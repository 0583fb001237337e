# SPDX-License-Identifier: GPL-2.0-or-later
"""``vhostvmbus serve scsi …`` with slow disks, so that packets are in flight all the time: no plan,
and each transfer sleeps for some milliseconds before it is done.
"""

import sys
import time

from vhostvmbus.cli import main
from vhostvmbus.devices.scsi.disk import FileDisk
from vhostvmbus.devices.scsi.unit import DataBuffer

read_into, write_from = FileDisk.read_into, FileDisk.write_from


def slow_read(self: FileDisk, data: DataBuffer, offset: int, length: int) -> None:
    """In the pool: several at a time."""
    time.sleep(0.005)
    read_into(self, data, offset, length)


def slow_write(self: FileDisk, data: DataBuffer, offset: int, length: int) -> None:
    """On the channel's thread."""
    time.sleep(0.001)
    write_from(self, data, offset, length)


FileDisk.read_into = slow_read  # type: ignore[method-assign]
FileDisk.write_from = slow_write  # type: ignore[method-assign]
FileDisk.would_wait = lambda self, offset, length: True  # type: ignore[method-assign]
FileDisk.direct = lambda self: None  # type: ignore[method-assign]
sys.exit(main(["serve", *sys.argv[1:]]))
