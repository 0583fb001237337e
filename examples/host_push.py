# SPDX-License-Identifier: GPL-2.0-or-later
"""The host sends, and the guest completes. A packet of the guest asks what came back.

Try it: ``vhostvmbus try examples/host_push.py:HostPush --count 1``
"""

from uuid import UUID

from vhostvmbus.device import Channel, Device, Packet
from vhostvmbus.guest import Exchange

GREETINGS = (b"one.....", b"two.....", b"three...")


class HostPush(Device):
    """Sends three packets when the channel starts."""

    class_id = UUID("0a6a2d0c-41a6-4f0e-9a52-6d6b6f2f1c11")

    def started(self, channel: Channel) -> None:
        """A full ring is no reason to wait: packets queue, in order."""
        self.answers: list[bytes | None] = []
        for greeting in GREETINGS:
            channel.send(greeting, on_completion=self.answers.append)

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Completes with all that the guest has answered."""
        packet.complete(b"".join(answer or b"(closed)" for answer in self.answers))


def check(exchange: Exchange) -> bool:
    """What ``vhostvmbus try`` expects: it answers each packet with its own payload."""
    return exchange.completion == b"".join(GREETINGS)
