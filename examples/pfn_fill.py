# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes each packet's in-band bytes into the guest's pages, over and over.

Try it: ``vhostvmbus try examples/pfn_fill.py:PfnFill --pages 16 --payload abcdefgh``
"""

from uuid import UUID

from vhostvmbus.device import Channel, Device, Packet
from vhostvmbus.guest import Exchange


class PfnFill(Device):
    """Completes with the number of bytes written: 8 bytes, little-endian."""

    class_id = UUID("c1b62f0d-53c5-4a2e-8a43-0b8a7a4ef5d3")
    max_external_data = 1 << 20

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """One write, however the pages are scattered."""
        size = len(packet.external_data) if packet.external_data is not None else 0
        if packet.external_data is not None:
            packet.external_data.write(repeated(packet.payload, size))
        packet.complete(size.to_bytes(8, "little"))


def repeated(pattern: bytes, size: int) -> bytes:
    """``size`` bytes of ``pattern``; zeros if there is none."""
    return ((pattern or b"\0") * (size // len(pattern or b"\0") + 1))[:size]


def check(exchange: Exchange) -> bool:
    """What ``vhostvmbus try`` expects."""
    size = len(exchange.before)
    sent = exchange.payload + bytes(-len(exchange.payload) % 8)
    return exchange.after == repeated(sent, size) and exchange.completion[0:8] == size.to_bytes(
        8, "little"
    )
