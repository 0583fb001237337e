# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory table and the limits of a connection ("Guest memory", "Limits").

The session asks :meth:`Books.refusal` before a request is carried out and tells
:meth:`Books.enter` when it has been.  No I/O and no guest memory.  What GPADLs and
channels exist is not repeated here: the back end knows, and refuses for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.wire.gpa import MAX_REGIONS
from vhostvmbus.wire.ntstatus import NtStatus


@dataclass(frozen=True, slots=True)
class Limits:
    """What one front end may ask of a back end.

    A PFN takes 8 bytes of a GPADL's list, so a list of 4 MiB describes 2 GiB of guest
    memory.  A code map has one bit for each 4 KiB: 1 GiB covers 32 TiB.
    """

    mem_slots: int = MAX_REGIONS
    gpadl_list_bytes: int = 4 << 20
    code_map_bytes: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not carried out: the status for the front end, words for the log."""

    status: NtStatus
    reason: str


class Books:
    """The memory table of one connection."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        #: guest-physical address → region
        self.regions: dict[int, m.MemoryRegion] = {}

    def refusal(self, message: m.Message) -> Refusal | None:
        """Why `message` cannot be carried out, or None."""
        match message:
            case m.AddMemReg(region):
                if len(self.regions) >= self.limits.mem_slots:
                    return Refusal(
                        NtStatus.INSUFFICIENT_RESOURCES,
                        f"more than {self.limits.mem_slots} memory regions",
                    )
                return _overlap_among((*self.regions.values(), region))
            case m.RemMemReg(region):
                return self._refuse_removal(region)
            case m.SetMemTable(regions):
                return _overlap_among(regions)
            case m.GpadlCreate(range_bytes=size) if size > self.limits.gpadl_list_bytes:
                return Refusal(
                    NtStatus.INSUFFICIENT_RESOURCES, f"a GPADL list of {size} bytes is too long"
                )
            case m.Open() if not self.regions:
                return Refusal(NtStatus.INVALID_DEVICE_STATE, "there is no guest memory yet")
            case m.SetCodeMap(map_bytes=size) if size > self.limits.code_map_bytes:
                return Refusal(
                    NtStatus.INSUFFICIENT_RESOURCES, f"a code map of {size} bytes is too big"
                )
        return None

    def enter(self, message: m.Message) -> None:
        """`message` has been carried out."""
        match message:
            case m.AddMemReg(region):
                self.regions[region.guest_phys_addr] = region
            case m.RemMemReg(region):
                del self.regions[region.guest_phys_addr]
            case m.SetMemTable(regions):
                self.regions = {region.guest_phys_addr: region for region in regions}

    def _refuse_removal(self, region: m.MemoryRegion) -> Refusal | None:
        # The standard: "identified by its guest address, user address and size".
        known = self.regions.get(region.guest_phys_addr)
        if known is None or (known.size, known.user_addr) != (region.size, region.user_addr):
            return Refusal(
                NtStatus.INVALID_PARAMETER,
                f"no memory region of {region.size:#x} bytes at {region.guest_phys_addr:#x}",
            )
        return None


def _overlap_among(regions: tuple[m.MemoryRegion, ...]) -> Refusal | None:
    ordered = sorted(regions, key=lambda region: region.guest_phys_addr)
    for below, above in pairwise(ordered):
        if below.guest_phys_addr + below.size > above.guest_phys_addr:
            return Refusal(
                NtStatus.CONFLICTING_ADDRESSES,
                f"memory regions at {below.guest_phys_addr:#x} and {above.guest_phys_addr:#x} "
                "overlap",
            )
    return None
