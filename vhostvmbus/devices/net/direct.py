# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames from a link whose descriptors the card may read itself, to the guest: in C.

Like :class:`~vhostvmbus.devices.net.receiver.Receiver`, of which everything unusual is left: no
buffer, no section, no link. Invariants: as there; and what the data path left over is delivered.
"""

from __future__ import annotations

import os
import time
from typing import Protocol

from vhostvmbus.devices.net.buffers import ReceiveBuffer
from vhostvmbus.devices.net.datapath import DataPath, Part, State
from vhostvmbus.devices.net.link import Link
from vhostvmbus.devices.net.receiver import PAUSE, Deliver, Delivery, Owner, Receiver


class DirectOwner(Owner, Protocol):
    """What the card is to it."""

    def woken(self) -> None:
        """Something may have to be done that waited: sections came back, above all."""


class DirectReceiver(Receiver):
    """Serves one queue of a link with the card's data path."""

    def __init__(
        self,
        owner: DirectOwner,
        deliver: Deliver,
        link: Link,
        queue: int,
        name: str,
        path: DataPath,
    ) -> None:
        super().__init__(owner, deliver, link, queue, name)
        self._path = path
        self._direct_owner = owner

    def attach(self, buffer: ReceiveBuffer) -> None:
        """Frames go into this buffer from now on."""
        super().attach(buffer)
        self.wake()

    def _turn(self, pause: float | None) -> float | None:
        if pause is not None or self._usable() is None:
            pause = super()._turn(pause)
            self._direct_owner.woken()  # perhaps it was, and for that
            return pause
        served = self._path.serve(self._queue, self._wake_fd)
        if served.left:
            self._hand_over(served.left, served.lease)
        match served.state:
            case State.WOKEN:
                os.eventfd_read(self._wake_fd)
                self._direct_owner.woken()
            case State.NO_SECTION:
                self._starved()
                return PAUSE
            case State.NO_BUFFER:
                return PAUSE  # the guest is about to take it back, or has just lent it
            case State.BROKEN:
                time.sleep(PAUSE)
        self._starved_since = 0.0
        return None

    def _usable(self) -> ReceiveBuffer | None:
        """The buffer, if frames are wanted and it can take them."""
        with self._lock:
            buffer = self._buffer
        if buffer is None or buffer.mapping.closed or not self._owner.adapter.packet_filter:
            return None
        return buffer

    def _take(self) -> bool | None:
        # What can be taken, the data path takes.
        return super()._take() if self._usable() is None else False

    def _hand_over(self, left: list[Part], lease: int) -> None:
        with self._lock:  # nothing is told of a buffer that was taken back
            buffer = self._buffer
            if buffer is None or buffer.lease != lease:
                for part in left:
                    self._path.give(lease, part.section)
                self.counters.receive_no_buffer += len(left)
                return
            groups: dict[int, Delivery] = {}
            for part in left:
                section = buffer.section_number(part.section)
                delivery = groups.setdefault(part.channel, Delivery())
                delivery.ranges.append((part.byte_count, part.byte_offset))
                delivery.sections.append(section)
                delivery.written += section.spans
            for channel, delivery in groups.items():
                self.counters.receive_no_buffer += self._deliver(channel, buffer, delivery)
