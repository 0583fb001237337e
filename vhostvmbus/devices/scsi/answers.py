# SPDX-License-Identifier: GPL-2.0-or-later
"""The outcome of a SCSI command in the words of storvsp, and a limit on how often it is logged.

SRB and NT status are those that Linux's ``storvsc_drv.c`` acts upon.
"""

from __future__ import annotations

import time

from vhostvmbus.devices.scsi.commands import Outcome, Status
from vhostvmbus.devices.scsi.storvsp import Srb, SrbStatus
from vhostvmbus.wire.ntstatus import NtStatus


def answer(srb: Srb, outcome: Outcome) -> bytes:
    """Returns the SRB and NT status for what became of a command, as drivers expect them."""
    if outcome.no_unit:
        return srb.answer(
            status=NtStatus.DEVICE_DOES_NOT_EXIST,
            srb_status=SrbStatus.INVALID_LUN,
            scsi_status=Status.CHECK_CONDITION,
        )
    if outcome.sense is None:
        return srb.answer(transferred=outcome.transferred)
    return srb.answer(
        status=NtStatus.IO_DEVICE_ERROR,
        srb_status=SrbStatus.ERROR,
        scsi_status=outcome.status,
        sense=outcome.sense.fixed(),
    )


class Complaints:
    """A limit of ten messages in ten seconds: a guest must not fill the host's log."""

    def __init__(self) -> None:
        self._since = 0.0
        self._count = 0

    def allowed(self) -> bool:
        """Returns whether one more message may be written now."""
        now = time.monotonic()
        if now - self._since > 10:
            self._since, self._count = now, 0
        self._count += 1
        return self._count <= 10
