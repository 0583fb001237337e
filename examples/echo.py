# SPDX-License-Identifier: GPL-2.0-or-later
"""Sends every packet's in-band bytes back as its completion.

Try it: ``vhostvmbus try examples/echo.py:Echo --pages 0``
"""

from uuid import UUID

from vhostvmbus.device import Channel, Device, Packet
from vhostvmbus.guest import Exchange


class Echo(Device):
    """The smallest useful device."""

    class_id = UUID("6c0cb9a5-5b1b-4c0f-9d0b-6fb8d2a0e4c1")
    gather_completions = True

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Completes at once."""
        packet.complete(packet.payload)


def check(exchange: Exchange) -> bool:
    """What ``vhostvmbus try`` expects; lengths on the wire are multiples of 8."""
    return exchange.completion == exchange.payload + bytes(-len(exchange.payload) % 8)
