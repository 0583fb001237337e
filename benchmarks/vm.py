# SPDX-License-Identifier: GPL-2.0-or-later
"""In a virtual machine: ``fio`` on our disk beside QEMU's own virtio-blk, and what it costs that a
translated guest never executes stale code. ``lab`` says which disks there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.guest import plain_guest
from benchmarks.lab import BLIND, KERNEL, OURS, ROUNDS, STARTS, VIRTIO, Lab, Pattern, open_lab
from benchmarks.table import Table

BUSY = 0.8
"""The part of a processor's time from which on a thread counts as busy."""
CROWDED = 0.9
"""The part of all processors' time from which on something had to wait for one."""

PATTERNS = (
    Pattern("4 KiB random read", "randread", "4k", 1, "same"),
    Pattern("4 KiB random read", "randread", "4k", 1, "other"),
    Pattern("4 KiB random read", "randread", "4k", 4),
    Pattern("4 KiB random read", "randread", "4k", 32),
    Pattern("128 KiB sequential read", "read", "128k", 4),
    Pattern("4 KiB random write", "randwrite", "4k", 1, "same"),
    Pattern("4 KiB random write", "randwrite", "4k", 32),
)
BLIND_READS = [
    pattern
    for pattern in PATTERNS
    if pattern.kind == "randread" and (pattern.depth, pattern.processor) != (1, "other")
]


def limit(lab: Lab, what: str) -> str:
    """Returns what keeps requests to our disk from being faster."""
    device, machine = (
        lab.median(what, OURS, "back_end_busy"),
        lab.median(what, OURS, "machine_busy"),
    )
    if max(device, machine) > BUSY:
        return "back end's thread" if device > machine else "guest's processor"
    if lab.median(what, OURS, "host_busy") > CROWDED:
        return "host's processors"
    return "wake-ups"


def fio_table(lab: Lab) -> Table:
    """Returns our disk beside virtio-blk."""
    table = Table(
        f"In a virtual machine ({lab.accel}): fio on our disk and on QEMU's virtio-blk",
        (
            "request",
            "ours/s",
            "virtio/s",
            "ratio",
            "ours us",
            "virtio us",
            "back end CPU us",
            "QEMU CPU us",
            "virtio CPU us",
            "limit of ours",
        ),
    )
    spread = 0.0
    for pattern in PATTERNS:
        what = str(pattern)
        servers = (OURS, VIRTIO, BLIND) if pattern in BLIND_READS else (OURS, VIRTIO)
        lab.alternate(what, servers, partial(lab.fio, pattern=pattern))
        ours, virtio = lab.median(what, OURS), lab.median(what, VIRTIO)
        spread = max(spread, lab.spread(what, OURS), lab.spread(what, VIRTIO))
        table.add(
            what,
            ours,
            virtio,
            ours / virtio,
            lab.median(what, OURS, "latency"),
            lab.median(what, VIRTIO, "latency"),
            lab.median(what, OURS, "back_end_cpu"),
            lab.median(what, OURS, "machine_cpu"),
            lab.median(what, VIRTIO, "machine_cpu"),
            limit(lab, what),
        )
    table.notes = [
        f"medians of {ROUNDS} rounds in turn, which differ by up to {spread:.0f} %; "
        "fio: libaio, direct=1, one job",
        "virtio: virtio-blk-pci in QEMU's main loop, aio=threads, cache=writeback, a queue for "
        "each CPU; the files, of the same bytes, are in the host's page cache",
        "us: median latency; CPU us: processor time for each request, of the back end, of QEMU "
        "with ours (nearly all the guest's own work) and with virtio (the disk as well)",
        "same, other CPU: fio on the guest's processor that the first channel interrupts, or on "
        "the other, which has a channel of its own; so has virtio a queue for each",
        f"limit of ours: the thread that runs for more than {BUSY:.0%} of the time; or the host's "
        f"processors, if more than {CROWDED:.0%} of their time is used; or else the time that "
        "waking takes: back end, QEMU's main loop, guest's processor",
    ]
    return table


def code_table(lab: Lab) -> Table:
    """Returns reads with and without a look at the code map, in the same guest."""
    table = Table(
        "Translated code: the back end with and without invalidation, same guest",
        ("workload", "with/s", "without/s", "ratio", "virtio/s", "wrong without"),
        notes=[
            "without: the back end has the code map and never looks; QEMU maintains it either way",
            "reads of code: 4 KiB into a page that was executed just before, then a call of it; "
            "limit: an INVALIDATE_CODE round trip and a new translation each",
            f"cold starts: {STARTS} programs of /usr/bin from a disk that is not in the guest's "
            "cache; where all three agree, the guest's own work is the limit",
        ],
    )
    lab.alternate("reads of code", (OURS, VIRTIO, BLIND), lab.code_reads)
    lab.alternate("cold starts", (OURS, VIRTIO, BLIND), lab.cold_starts)
    for what in (*map(str, BLIND_READS), "reads of code", "cold starts"):
        ours, blind = lab.median(what, OURS), lab.median(what, BLIND)
        wrong = f"{lab.median(what, BLIND, 'wrong'):.0f} %" if what == "reads of code" else ""
        table.add(what, ours, blind, ours / blind, lab.median(what, VIRTIO), wrong)
    if any(sample.wrong for sample in lab.samples["reads of code", OURS]):
        raise RuntimeError("stale code was executed in spite of the invalidation")
    return table


def prepare() -> None:
    """Has what the guest is made of built and fetched."""
    plain_guest(KERNEL)


def tables(seconds: float) -> Iterator[Table]:
    """Yields the tables of this benchmark; the second is of translation only."""
    with open_lab(seconds) as lab:
        yield fio_table(lab)
        if lab.accel == "tcg":
            yield code_table(lab)
