# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes its time, and completes packets in another order than they came in: the last one first.

Try it: ``vhostvmbus try examples/slow_and_out_of_order.py:SlowAndOutOfOrder``
"""

import asyncio
from uuid import UUID

from vhostvmbus.device import Channel, Device, Packet
from vhostvmbus.guest import Exchange


class SlowAndOutOfOrder(Device):
    """Whatever has come within a tenth of a second is completed backwards."""

    class_id = UUID("93c9c5a4-0d35-4b1a-bb0b-8f0d0c7e6a42")

    def opened(self, channel: Channel) -> None:
        """What a device keeps for a channel."""
        self.held: list[Packet] = []

    async def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Runs on the device's event loop: other packets come while this one sleeps."""
        self.held.append(packet)
        await asyncio.sleep(0.1)
        latest = self.held.pop()
        latest.complete(latest.payload)


def check(exchange: Exchange) -> bool:
    """What ``vhostvmbus try`` expects."""
    return exchange.place == exchange.count - 1 - exchange.number
