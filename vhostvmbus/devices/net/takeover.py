# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes over a card whose back end has ended, so that its driver can let it go.

The protocol has no way to ask what had been agreed, so the card is offered anew. A driver that
loses its card waits for the completion of every packet that it sent, but takes none from the ring
any more (Linux: ``netvsc_device_idle``, ``vmbus_reset_channel_cb``). So it has to be quiet before
the card is rescinded: it is told that the link is down, which makes it stop sending, and all that
it had sent is refused. To tell it, this back end has to know where its receive buffer is: the one
before left a note of it, beside the packets in flight.

The note is checked like what a guest says: it may hold anything.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from typing import Final, Self

from vhostvmbus.channel import Channel
from vhostvmbus.device import GuestClock, wait_until_quiet
from vhostvmbus.devices.net.buffers import DEFAULT_SECTION, ReceiveBuffer
from vhostvmbus.devices.net.nvsp import MESSAGE_SIZE, OLD_MESSAGE_SIZE
from vhostvmbus.wire.errors import ChannelClosed, FrontEndError, GuestError, UsageError

log = logging.getLogger(__name__)

_NOTE: Final = struct.Struct("<4sIIII")
_MAGIC: Final = b"rbuf"
_MAX_ID: Final = 0xFFFF
"""The largest name of a buffer, which has 16 bits in a packet."""


@dataclass(frozen=True, slots=True)
class BufferNote:
    """A note of where a guest's receive buffer is."""

    gpadl: int
    buffer_id: int
    section_size: int
    message_size: int
    """The bytes of NVSP messages to that guest."""

    def pack(self) -> bytes:
        """Returns the bytes for :attr:`Channel.note`."""
        fields = (self.gpadl, self.buffer_id, self.section_size, self.message_size)
        return _NOTE.pack(_MAGIC, *fields)

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """Returns the note that a back end before left; ``None`` if that is no such note."""
        if len(data) != _NOTE.size:
            return None
        magic, gpadl, buffer_id, section_size, message_size = _NOTE.unpack(data)
        if magic != _MAGIC or section_size < DEFAULT_SECTION or buffer_id > _MAX_ID:
            return None
        if message_size not in (OLD_MESSAGE_SIZE, MESSAGE_SIZE):
            return None
        return cls(gpadl, buffer_id, section_size, message_size)


def find_buffer(channel: Channel) -> tuple[BufferNote, ReceiveBuffer] | None:
    """Returns the guest's receive buffer, mapped, and the note of it that the back end before left.

    ``None`` if there is none that can be used.
    """
    note = BufferNote.parse(channel.note)
    if note is None:
        return None
    try:
        mapping = channel.map_gpadl(note.gpadl)
        try:
            buffer = ReceiveBuffer(mapping, note.buffer_id, note.section_size)
        except GuestError:
            channel.unmap_gpadl(note.gpadl)
            raise
    except (ChannelClosed, FrontEndError, UsageError, GuestError) as error:
        log.warning("%s: the guest's receive buffer is not found: %s", channel.name, error)
        return None
    # Frames that the guest has not looked at yet may be anywhere in it.
    wait_until_quiet(lambda: [channel], 0.0, 1.0, clock=GuestClock(lambda: [channel]))
    return note, buffer
