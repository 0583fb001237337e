# SPDX-License-Identifier: GPL-2.0-or-later
"""The limits of what one front end may ask of a back end ("Limits"), and how a session refuses."""

from __future__ import annotations

from dataclasses import dataclass

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import MAX_REGIONS


@dataclass(frozen=True, slots=True)
class Refusal:
    """The reason that a request is not carried out: a status, and words for the log."""

    status: NtStatus
    reason: str


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits of one connection.

    A PFN takes 8 bytes of a GPADL's list, so a list of 4 MiB describes 2 GiB of guest
    memory. A code map has one bit for each 4 KiB: 1 GiB covers 32 TiB.
    """

    mem_slots: int = MAX_REGIONS
    gpadl_list_bytes: int = 4 << 20
    code_map_bytes: int = 1 << 30

    def refusal(self, message: m.Message) -> Refusal | None:
        """Returns why ``message`` asks for too much, or ``None``."""
        match message:
            case m.GpadlCreate(range_bytes=size) if size > self.gpadl_list_bytes:
                reason = f"a GPADL list of {size} bytes is too long"
            case m.SetCodeMap(map_bytes=size) if size > self.code_map_bytes:
                reason = f"a code map of {size} bytes is too big"
            case _:
                return None
        return Refusal(NtStatus.INSUFFICIENT_RESOURCES, reason)
