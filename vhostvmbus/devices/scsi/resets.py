# SPDX-License-Identifier: GPL-2.0-or-later
"""Resets that wait for the requests before them.

A RESET_BUS, RESET_ADAPTER or RESET_LUN is completed once every request that was taken before it is.
Invariants: a reset is due once, when the last of those has ended; one whose channel is closed never
is, and is nothing to the session that comes next.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from vhostvmbus.channel import Channel, Packet
from vhostvmbus.devices.scsi.lease import Lease
from vhostvmbus.devices.scsi.session import Reset


class Barrier:
    """A reset that waits for the packets taken before it."""

    __slots__ = ("lease", "packet", "pending", "reset")

    def __init__(self, reset: Reset, packet: Packet, lease: Lease) -> None:
        self.reset = reset
        self.packet = packet
        self.lease = lease
        """The right to reset units, of the channel that the reset came on."""
        self.pending: set[Packet] = set()


class Barriers:
    """The resets that wait. Thread-safe."""

    def __init__(self) -> None:
        self._waiting: list[Barrier] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, barrier: Barrier, users: Iterable[set[Packet]]) -> bool:
        """Has a reset wait for those who use the disks now; returns whether there is nobody."""
        with self._lock:
            self._waiting.append(barrier)  # before the look: who ends meanwhile says so
            for each in users:
                barrier.pending |= each.copy()
            if not barrier.pending:
                self._waiting.remove(barrier)
                return True
        return False

    def passed(self, packet: Packet) -> list[Barrier]:
        """Notes that a request has ended; returns the resets that waited for it alone."""
        with self._lock:
            for barrier in self._waiting:
                barrier.pending.discard(packet)
            return self._take_due()

    def closed(self, channel: Channel) -> list[Barrier]:
        """Forgets a channel's resets and requests; returns the resets that are due by that."""
        with self._lock:
            self._waiting = [each for each in self._waiting if each.packet.channel is not channel]
            for barrier in self._waiting:
                barrier.pending = {
                    packet for packet in barrier.pending if packet.channel is not channel
                }
            return self._take_due()

    def _take_due(self) -> list[Barrier]:
        due = [barrier for barrier in self._waiting if not barrier.pending]
        if due:
            self._waiting = [barrier for barrier in self._waiting if barrier.pending]
        return due
