# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures what the code map costs a read: the back end and a guest in software, without a VM's
noise.

See "Translated code" in ``docs/vhost-user-vmbus.md``.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.disk import back_end, channel_reads, make_image, processor_time
from benchmarks.table import Table
from vhostvmbus.guest import SoftwareGuest
from vhostvmbus.guest.storvsc import Storvsc
from vhostvmbus.wire.vmbus import PAGE_SIZE

ROUNDS = 3
MAPS = ("none", "bits clear", "all bits set")


def tables(seconds: float) -> list[Table]:
    """Returns the table of this benchmark."""
    table = Table(
        "Translated code: 4 KiB random reads through the back end, software guest",
        ("code map", "depth", "reads/s", "ratio", "round trips/read", "device CPU us"),
    )
    rates: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="vhostvmbus-") as name:
        folder = Path(name)
        make_image(folder / "disk.raw")
        with back_end(folder / "disk.raw", folder) as (pid, path):
            for _ in range(ROUNDS):
                for kind in MAPS:
                    for depth in (1, 32):
                        figures = _mapped_reads(path, pid, kind, depth, seconds)
                        rates.setdefault((kind, depth), []).append(figures)
    for kind in MAPS:
        for depth in (1, 32):
            rate, trips, device = map(statistics.median, zip(*rates[kind, depth], strict=True))
            base = statistics.median(figures[0] for figures in rates[MAPS[0], depth])
            table.add(kind, depth, rate, rate / base, trips, device)
    table.notes = [
        "bits clear: a fence and a look at one bit; all bits set: each publication of completions "
        "(up to 16 together) waits for one answer to INVALIDATE_CODE",
        "limit: the back end's processor time; with all bits set also two wake-ups for each round "
        "trip, which a Python thread of the guest's process answers",
    ]
    return [table]


def _mapped_reads(
    path: Path, pid: int, kind: str, depth: int, seconds: float
) -> tuple[float, float, float]:
    """Returns reads a second, round trips a second, and back end microseconds for each read."""
    with (
        SoftwareGuest.connect(path, code_map=kind != MAPS[0]) as guest,
        guest.open_channel(ring_pages=(33, 33)) as channel,
    ):
        driver = Storvsc(guest, channel)
        driver.initialize()
        if kind == MAPS[2] and guest.code_map is not None:
            for region in guest.ram.regions:
                first = region.guest_phys_addr // PAGE_SIZE
                for pfn in range(first, first + region.size // PAGE_SIZE):
                    guest.code_map.mark(pfn)
        before = len(guest.invalidations)
        device, start = processor_time(pid), time.perf_counter()
        count = channel_reads(driver, channel, 4096, depth, False, seconds)
        taken, device = time.perf_counter() - start, processor_time(pid) - device
        trips = len(guest.invalidations) - before
    return count / taken, trips / count, device / count * 1e6
