# SPDX-License-Identifier: GPL-2.0-or-later
"""The in-flight region: a file that outlives the back end, with a part for each channel.

In a channel's part are the packets that were taken from its ring and are not completed, so that
the back end that comes after one that was killed can do them: docs/vhost-user-vmbus.md,
"Packets in flight". What is in a part, and why it is right at every moment, is in
``inflight.c``. Invariants: the file can neither shrink nor grow; what another back end left in it
is checked before it is used.
"""

import fcntl
import os
from typing import Final

from vhostvmbus.engine import lib
from vhostvmbus.ring.results import PacketLimits
from vhostvmbus.ring.ring import Ring
from vhostvmbus.wire.errors import InflightInvalid
from vhostvmbus.wire.vmbus import PAGE_SIZE

MAX_SLOTS: Final = 0xFFFF
"""Packets of one channel at most: ``queue_size`` has 16 bits, and so has ``num_queues``."""
MAX_SLOT_BYTES: Final = 64 << 10
"""A packet of more bytes is recorded without them, and comes back as one that is too large."""
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def slot_bytes(limits: PacketLimits) -> int:
    """Returns about how many bytes the longest packet within ``limits`` takes in a slot.

    Headers may be longer than their ranges need (Linux's storvsc has room for 32 PFNs always).
    """
    pages = limits.max_external_data // PAGE_SIZE + 2 * limits.max_external_ranges
    longest = 512 + 8 * (pages + limits.max_external_ranges) + limits.max_payload
    return min((longest + 63) & ~63, MAX_SLOT_BYTES)


class InflightRegion:
    """An in-flight region: ``channels`` parts of ``part_bytes`` each in ``fd``, from ``offset`` on.

    Each part has room for ``slots`` packets. Pages that were never used take no memory. The object
    owns ``fd``.
    """

    def __init__(self, fd: int, offset: int, part_bytes: int, channels: int, slots: int) -> None:
        self.fd = fd
        self.offset = offset
        self.part_bytes = part_bytes
        self.channels = channels
        self.slots = slots

    @property
    def size(self) -> int:
        """The size of all parts together, in bytes."""
        return self.part_bytes * self.channels

    @classmethod
    def create(cls, channels: int, slots: int, limits: PacketLimits) -> "InflightRegion":
        """Makes an empty region in a file of its own. Raises :exc:`OSError`."""
        slots = min(slots, MAX_SLOTS)
        part = int(lib.vvb_inflight_size(slots, slot_bytes(limits)))
        fd = os.memfd_create("vmbus-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, part * channels)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, 0, part, channels, slots)

    @classmethod
    def adopt(cls, fd: int, size: int, offset: int, channels: int, slots: int) -> "InflightRegion":
        """Takes a region of ``size`` bytes that another back end made. The caller keeps ``fd``.

        Raises :exc:`InflightInvalid` unless these bytes can be one.
        """
        if not channels or not slots or size % channels or offset % PAGE_SIZE:
            raise InflightInvalid(
                f"{size} bytes at {offset} are no {channels} parts with {slots} slots each"
            )
        part = size // channels
        smallest = int(lib.vvb_inflight_size(slots, 1))
        if part % PAGE_SIZE or part < smallest:
            raise InflightInvalid(f"{part} bytes are no part with {slots} slots")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise InflightInvalid(f"this is no memfd: {error.strerror}") from None
        if seals & SEALS != SEALS or seals & ~(SEALS | fcntl.F_SEAL_SEAL):
            raise InflightInvalid(f"the memfd is not sealed as it should be (seals {seals:#x})")
        if os.fstat(fd).st_size < offset + size:
            raise InflightInvalid(f"the memfd ends before {offset + size} bytes")
        return cls(os.dup(fd), offset, part, channels, slots)

    def record(self, index: int, ring: Ring, *, resume: bool) -> None:
        """Has ``ring`` record its packets in the part of channel ``index``.

        Without ``resume`` the part is emptied first. If it cannot be used :exc:`InflightInvalid`
        is raised, and the ring records nothing. An index without a part is no error: nothing is
        recorded for it.
        """
        if index >= self.channels:
            return
        if not resume:
            self.clear(index)
        start = self.offset + index * self.part_bytes
        ring.record(self.fd, start, self.part_bytes, self.slots, resume=resume)

    def clear(self, index: int | None = None) -> None:
        """Empties one channel's part, or all. Raises :exc:`InflightInvalid`."""
        start, size = self.offset, self.size
        if index is not None:
            if index >= self.channels:
                return
            start, size = start + index * self.part_bytes, self.part_bytes
        result = lib.vvb_inflight_clear(self.fd, start, size)
        if result:
            raise InflightInvalid(f"the region cannot be emptied: {os.strerror(-result)}")

    def close(self) -> None:
        """Closes the file; rings that record in it go on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
