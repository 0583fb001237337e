# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices that run in a process of their own, which is killed."""

from __future__ import annotations

import random
import threading
import time

from tests.support.devices import CLASS_ID, Noting
from vhostvmbus.device import Channel, Packet


class Keeps(Noting):
    """Takes every packet and completes none."""

    class_id = CLASS_ID
    channels = 3
    max_channels = 3

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        pass


class Muddles(Keeps):
    """Completes with the payload backwards: some at once, some later, from two threads."""

    gather_completions = True

    def __init__(self) -> None:
        super().__init__()
        self._held: list[Packet] = []
        self._chance = random.Random()
        for _ in range(2):
            threading.Thread(target=self._work, daemon=True).start()

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        if self._chance.random() < 0.5:
            packet.complete(packet.payload[::-1])
        else:
            self._held.append(packet)

    def _work(self) -> None:
        while True:
            time.sleep(self._chance.random() * 0.001)
            while self._held:
                try:
                    packet = self._held.pop(self._chance.randrange(len(self._held)))
                except (IndexError, ValueError):
                    continue  # the other thread took it
                packet.complete(packet.payload[::-1])
