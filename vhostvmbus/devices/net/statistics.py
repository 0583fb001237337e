# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters of a network card.

Each is written by one thread: a channel's worker counts what the guest sent on it, a receiver what
it received; sums are made by whoever reads. Frames and bytes are Ethernet's, without frame check
sequence; a large send counts as one frame.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MULTICAST_BIT = 1
BROADCAST = b"\xff" * 6


@dataclass(slots=True)
class Direction:
    """The frames and bytes of one way, by kind of destination address."""

    directed_frames: int = 0
    directed_bytes: int = 0
    multicast_frames: int = 0
    multicast_bytes: int = 0
    broadcast_frames: int = 0
    broadcast_bytes: int = 0

    def count(self, destination: bytes, length: int) -> None:
        """Counts one frame of ``length`` bytes to that address."""
        if not destination[0] & MULTICAST_BIT:
            self.directed_frames += 1
            self.directed_bytes += length
        elif destination == BROADCAST:
            self.broadcast_frames += 1
            self.broadcast_bytes += length
        else:
            self.multicast_frames += 1
            self.multicast_bytes += length

    @property
    def frames(self) -> int:
        """The number of all frames."""
        return self.directed_frames + self.multicast_frames + self.broadcast_frames

    @property
    def bytes(self) -> int:
        """The number of all bytes."""
        return self.directed_bytes + self.multicast_bytes + self.broadcast_bytes


@dataclass(slots=True)
class Counters:
    """The counters of one thread."""

    sent: Direction = field(default_factory=Direction)
    received: Direction = field(default_factory=Direction)
    send_refused: int = 0
    """Frames of the guest that the host side did not take."""
    send_errors: int = 0
    """Frames, or whole packets, of the guest that were malformed."""
    large_sends: int = 0
    receive_filtered: int = 0
    """Frames from the host side that the packet filter does not want, or while it is zero."""
    receive_no_buffer: int = 0
    """Frames dropped because the guest had returned no receive section."""
    receive_errors: int = 0
    """Frames from the host side that fit no section, or made no sense."""
    coalesced: int = 0
    """Received frames that took more than one section."""
    control_dropped: int = 0
    """RNDIS answers that the guest left no room for."""

    def add(self, other: Counters) -> None:
        """Adds another thread's counters."""
        for mine, theirs in ((self.sent, other.sent), (self.received, other.received)):
            for name in Direction.__slots__:
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
        for name in self.__slots__:
            if name not in ("sent", "received"):
                setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, Any]:
        """Returns all counters, ready for JSON."""
        result: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, Direction):
                value = {
                    "frames": value.frames,
                    "bytes": value.bytes,
                    **{field: getattr(value, field) for field in Direction.__slots__},
                }
            result[name] = value
        return result
