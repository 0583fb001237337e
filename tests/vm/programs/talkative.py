# SPDX-License-Identifier: GPL-2.0-or-later
"""A device that writes: when it is made, when it is opened, and whatever a packet has it write."""

import logging
from uuid import UUID

from vhostvmbus.channel import Channel
from vhostvmbus.device import Device
from vhostvmbus.packet import Packet

log = logging.getLogger(__name__)
print("the file is read")


class Talkative(Device):
    """Payloads: ``print``, ``log``, ``raise``; ``flood`` is many lines at once."""

    class_id = UUID("7f2c9a54-2f0f-4b7e-9a0f-0d6a3a7d9c11")

    def opened(self, channel: Channel) -> None:
        """Prints."""
        print(f"channel {channel.index} is open")

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Writes, then completes, or not."""
        match bytes(packet.payload).rstrip(b"\0"):
            case b"print":
                print("printed", "in two words")
            case b"log":
                log.warning("logged")
            case b"raise":
                raise ValueError("raised")
            case b"flood":
                for number in range(100_000):
                    print(f"line {number}")
        packet.complete(b"written")
