# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory table of a connection ("Guest memory"): what the front end has said, and no more.

The session owns it: it asks :meth:`MemoryTable.refusal` before a request is carried out, and calls
:meth:`MemoryTable.enter` when it has been. So a request that is refused, here or by the back end,
leaves the table as it was. There is no I/O here and no guest memory: only the back end knows what
is mapped.
"""

from __future__ import annotations

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.limits import Refusal
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import overlap_among


class MemoryTable:
    """The regions of guest memory that a front end has shared, at most ``slots`` of them."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._regions: tuple[m.MemoryRegion, ...] = ()

    @property
    def regions(self) -> tuple[m.MemoryRegion, ...]:
        """The regions, in the order in which they came."""
        return self._regions

    def refusal(self, message: m.Message) -> Refusal | None:
        """Returns why ``message`` cannot be carried out with the present table, or ``None``."""
        match message:
            case m.AddMemReg() | m.SetMemTable():
                return self._refuse_table(self._after(message))
            case m.RemMemReg(region) if self._known(region) is None:
                return Refusal(
                    NtStatus.INVALID_PARAMETER,
                    f"no memory region of {region.size:#x} bytes at {region.guest_phys_addr:#x}",
                )
            case m.Open() if not self._regions:
                return Refusal(NtStatus.INVALID_DEVICE_STATE, "there is no guest memory yet")
        return None

    def enter(self, message: m.Message) -> None:
        """Takes note that ``message`` has been carried out."""
        self._regions = self._after(message)

    def _after(self, message: m.Message) -> tuple[m.MemoryRegion, ...]:
        """Returns the table as it is once ``message`` has been carried out."""
        match message:
            case m.AddMemReg(region):
                return (*self._regions, region)
            case m.RemMemReg(region):
                known = self._known(region)
                return tuple(other for other in self._regions if other is not known)
            case m.SetMemTable(regions):
                return regions
        return self._regions

    def _known(self, region: m.MemoryRegion) -> m.MemoryRegion | None:
        """Returns the region that a removal means: guest address, user address and size name it."""
        for known in self._regions:
            if (known.guest_phys_addr, known.user_addr, known.size) == (
                region.guest_phys_addr,
                region.user_addr,
                region.size,
            ):
                return known
        return None

    def _refuse_table(self, regions: tuple[m.MemoryRegion, ...]) -> Refusal | None:
        if len(regions) > self._slots:
            return Refusal(
                NtStatus.INSUFFICIENT_RESOURCES, f"more than {self._slots} memory regions"
            )
        overlap = overlap_among(regions)
        if overlap is None:
            return None
        below, above = overlap
        return Refusal(
            NtStatus.CONFLICTING_ADDRESSES,
            f"memory regions at {below.guest_phys_addr:#x} and {above.guest_phys_addr:#x} overlap",
        )
