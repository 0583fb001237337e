# SPDX-License-Identifier: GPL-2.0-or-later
"""What the end of a channel does to the disks when a thread of it does not end."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import cast

from tests.support.scsi_unit import code, make_unit, run
from tests.support.waiting import eventually, in_thread
from vhostvmbus.channel import Channel
from vhostvmbus.devices.scsi.lease import Lease
from vhostvmbus.devices.scsi.leaving import Leaving
from vhostvmbus.devices.scsi.requests import Disk, Requests

NOT_READY = (2, 4, 1)


def test_a_worker_that_hangs_makes_every_disk_not_ready() -> None:
    """It may be in the engine, with writes to any of them before it."""
    units = [make_unit()[0] for _ in range(2)]
    replans: list[int] = []
    gone = threading.Event()
    for unit in units:
        unit.stragglers.gone = gone.set
    requests = Requests(
        "scsi",
        1,
        {lun: Disk(unit) for lun, unit in enumerate(units)},
        Leaving(),
        lambda: replans.append(1),
        lambda channel, error: None,
    )
    go = threading.Event()
    worker, _ = in_thread(lambda: go.wait(20))
    channel = cast(Channel, SimpleNamespace(worker=worker, index=0))
    requests.channel_closed(channel, Lease())
    for unit in units:
        assert code(run(unit, bytes(6))[0]) == NOT_READY
    eventually(lambda: replans)
    go.set()
    worker.join(20)
    assert gone.wait(10)
    eventually(lambda: not any(unit.stragglers for unit in units))
    for unit in units:
        assert run(unit, bytes(6))[0].status == 0
    requests.channel_closed(channel, Lease())
    assert not any(unit.stragglers for unit in units), "it has ended"
    requests.close()
