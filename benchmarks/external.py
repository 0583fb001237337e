# SPDX-License-Identifier: GPL-2.0-or-later
"""External data: pages that a packet describes, read and written by the device.

The software guest here, the device in another process. For each number of pages: round trips
and bytes a second, one packet at a time and sixteen at a time, beside a plain copy of as many
bytes in the same run. The device copies every byte once, which is what the copy does; the rest
is the price of getting there.
"""

from __future__ import annotations

import functools

from benchmarks.reference import copies
from benchmarks.ring import Echo, Reader, in_another_process, throughput
from benchmarks.table import Table
from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device import Device
from vhostvmbus.guest import SoftwareGuest

PFNS = (1, 16, 256)
DEPTHS = (1, 16)
_CONTENT = bytes(range(256)) * 4096


class Writer(Echo):
    """Copies bytes into the guest's pages."""

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Writes into the pages, then completes."""
        if packet.external_data is not None:
            packet.external_data.write(memoryview(_CONTENT)[: len(packet.external_data)])
        packet.complete()


KINDS: tuple[tuple[str, type[Device], bool], ...] = (
    ("not touched", Echo, False),
    ("read", Reader, True),
    ("written", Writer, True),
)


def tables(seconds: float) -> list[Table]:
    """Returns the table of this benchmark."""
    table = Table(
        "External data: PFNs from a software guest to a device in another process",
        ("PFNs", "pages are", "depth", "round trips/s", "us", "GB/s", "memcpy GB/s", "x memcpy"),
    )
    for count in PFNS:
        size = count * 4096
        memcpy = copies(size, seconds)
        for kind, device, copied in KINDS:
            with (
                in_another_process(device) as (path, _),
                SoftwareGuest.connect(path) as guest,
                guest.open_channel(ring_pages=(65, 65)) as channel,
            ):
                pfns = guest.ram.alloc_pages(count)
                submit = functools.partial(channel.submit_with_external_pfns, b"command.", pfns)
                for depth in DEPTHS:
                    throughput(submit, depth, seconds / 10)  # warm up
                    _, figure = throughput(submit, depth, seconds)
                    rate = figure * size / 1e9
                    table.add(
                        count,
                        kind,
                        depth,
                        figure,
                        1e6 / figure,
                        rate if copied else "",
                        memcpy * size / 1e9 if copied else "",
                        figure / memcpy if copied else "",
                    )
    table.notes = [
        "x memcpy: bytes a second as a part of what a plain copy of as many bytes does here",
        "not touched: the pages are looked up and checked only",
    ]
    return [table]
