# SPDX-License-Identifier: GPL-2.0-or-later
"""Taking over a card whose back end has ended, so that its driver can let go of it.

The protocol has no way to ask what had been agreed, so the card is offered anew. A driver that
loses its card waits for the completion of every packet that it sent, but takes none from the ring
any more (Linux: ``netvsc_device_idle``, ``vmbus_reset_channel_cb``). So it has to be quiet before
the card is taken back: it is told that the link is down, which makes it stop sending, and all that
it had sent is refused. To tell it, this back end has to know where its receive buffer is: the one
before left a note of it, beside the packets in flight.

What is found in the note is checked like what a guest says; it may be anything.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

from vhostvmbus.channel import Channel, ChannelState

_NOTE: Final = struct.Struct("<4sIII")
_MAGIC: Final = b"rbuf"

CALM_SECONDS: Final = 0.3
"""So long the rings stay empty before the driver counts as quiet."""
LINK_CHANGE_SECONDS: Final = 2.2
"""So long Linux may take to act on a change of the link (``LINKCHANGE_INT`` is 2 s)."""
PATIENCE_SECONDS: Final = 6.0
"""After that the card is taken back all the same."""
_POLL_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class BufferNote:
    """Where a guest's receive buffer is."""

    gpadl: int
    buffer_id: int
    section_size: int

    def pack(self) -> bytes:
        """For :attr:`Channel.note`."""
        return _NOTE.pack(_MAGIC, self.gpadl, self.buffer_id, self.section_size)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """What a back end before left; ``None`` if that is no such note."""
        if len(data) != _NOTE.size:
            return None
        magic, gpadl, buffer_id, section_size = _NOTE.unpack(data)
        if magic != _MAGIC or not section_size:
            return None
        return cls(gpadl, buffer_id, section_size)


def _activity(channels: Sequence[Channel]) -> tuple[int, int]:
    """Packets that came so far, and what is not settled yet: bytes in rings, packets in hand."""
    came = unsettled = 0
    for channel in channels:
        ring = channel.ring_state
        came += channel.stats.packets_received
        unsettled += channel.outstanding
        if ring is not None:
            unsettled += ring.rx_available + ring.tx_size - ring.tx_free
    return came, unsettled


def wait_until_quiet(
    channels: Callable[[], Sequence[Channel]], least: float, patience: float = PATIENCE_SECONDS
) -> bool:
    """Until the guest sends nothing any more and has taken every completion; whether it has.

    Waits ``least`` seconds at any rate, and ``patience`` at most; not at all for a channel that
    is closed meanwhile.
    """
    begin = calm_since = time.monotonic()
    before = -1
    while (now := time.monotonic()) - begin < patience:
        alive = [channel for channel in channels() if channel.state is ChannelState.RUNNING]
        if not alive:
            return False
        came, unsettled = _activity(alive)
        if came != before or unsettled:
            before, calm_since = came, now
        elif now - calm_since >= CALM_SECONDS and now - begin >= least:
            return True
        time.sleep(_POLL_SECONDS)
    return False
