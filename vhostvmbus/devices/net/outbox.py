# SPDX-License-Identifier: GPL-2.0-or-later
"""Sends the guest, from Python, packets with receive sections: RNDIS answers, and some frames.

The frames are those of which the data path could not tell the guest itself, because code may be
where they were written, or because the ring is full.

Invariants: a section is given back once, either when the guest completed the packet that named it,
or when that packet could not be sent; answers go out in their order, and a bounded number of them
waits here when the guest has no section free. Any thread may use it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Final

from vhostvmbus.channel import Channel
from vhostvmbus.devices.net import nvsp
from vhostvmbus.devices.net.buffers import ReceiveBuffer, Section
from vhostvmbus.devices.net.datapath import Part
from vhostvmbus.devices.net.errors import ReturnError
from vhostvmbus.devices.net.nvsp import MessageType, RndisChannel
from vhostvmbus.wire.errors import ChannelClosed, GuestError, PacketTooBig, SendQueueFull
from vhostvmbus.wire.transfer import build_transfer_pages
from vhostvmbus.wire.vmbus import PacketType

MAX_WAITING: Final = 64
"""The most RNDIS answers that may wait for a section."""
_DATA = nvsp.rndis_packet(RndisChannel.DATA)
_CONTROL = nvsp.rndis_packet(RndisChannel.CONTROL)
_COMPLETE = MessageType.SEND_RNDIS_PACKET_COMPLETE.to_bytes(4, "little")


class Outbox:
    """One card's way to its guest.

    ``complain`` is called with returns that are none, and ``wait_for_section`` when :meth:`go_on`
    is to be called once sections come back.
    """

    def __init__(
        self,
        complain: Callable[[Channel, GuestError], None],
        wait_for_section: Callable[[], None],
    ) -> None:
        self._wait_for_section = wait_for_section
        self.channels: dict[int, Channel] = {}
        """The open channels."""
        self.buffer: ReceiveBuffer | None = None
        """The buffer whose sections are used; :meth:`use` sets it."""
        self.message_size = nvsp.MESSAGE_SIZE
        """The bytes of every NVSP message."""
        self.singly = False
        """Set if each frame goes in a packet of its own."""
        self.dropped = 0
        """How many RNDIS answers found no room."""
        self.lost = 0
        """How many frames, or parts of one, the guest could not be told of."""
        self._complain = complain
        self.held = False
        """Set while the guest's buffer is left alone; :meth:`hold` sets it."""
        self._lock = threading.Lock()
        self._waiting: deque[bytes] = deque()
        self._table = [0] * nvsp.SEND_TABLE_SIZE  # what a driver begins with

    def use(self, buffer: ReceiveBuffer | None) -> None:
        """Uses this buffer from now on; the one before is not touched any more."""
        with self._lock:
            self.buffer = buffer

    def hold(self, held: bool) -> None:
        """Keeps answers out of the guest's buffer while its machine stands still, or no longer."""
        with self._lock:
            self.held = held

    def forget(self) -> None:
        """Forgets the answers that wait, and the send table."""
        with self._lock:
            self._waiting.clear()
            self._table = [0] * nvsp.SEND_TABLE_SIZE

    def answer(self, messages: list[bytes]) -> None:
        """Sends RNDIS messages on the control channel, or keeps them; without any, sends those
        kept.
        """
        with self._lock:
            for message in messages:
                if len(self._waiting) < MAX_WAITING:
                    self._waiting.append(message)
                else:
                    self.dropped += 1
            channel, buffer = self.channels.get(0), self.buffer
            if self.held:
                return
            while self._waiting and channel is not None and buffer is not None:
                section = buffer.take()
                if section is None:
                    self._wait_for_section()
                    section = buffer.take()  # one may have come just before
                    if section is None:
                        return
                message = self._waiting.popleft()
                section.write(message)
                ranges = [(len(message), section.offset)]
                if not self._tell(channel, buffer, ranges, [section], _CONTROL):
                    self.dropped += 1

    def go_on(self) -> None:
        """Sends what waited for a section."""
        if self._waiting:
            self.answer([])

    def deliver(self, parts: Sequence[Part], lease: int) -> bool:
        """Tells the guest of frames in its buffer of that lease. Returns false if that buffer is
        gone.

        A channel's parts come in a row, and go into one packet, or one each if :attr:`singly`.
        """
        with self._lock:
            buffer = self.buffer
            if buffer is None or buffer.lease != lease:
                self.lost += len(parts)
                return False
            for (index, _), group in groupby(parts, self._packet_of):
                told = list(group)
                ranges = [(part.byte_count, part.byte_offset) for part in told]
                sections = [buffer.section_number(part.section) for part in told]
                channel = self.channels.get(index) or self.channels.get(0)
                if channel is None:
                    buffer.give(sections)
                if channel is None or not self._tell(channel, buffer, ranges, sections, _DATA):
                    self.lost += len(told)
            return True

    def _packet_of(self, part: Part) -> tuple[int, int]:
        """Returns what the parts of one packet have in common: the channel, at least."""
        return part.channel, part.section if self.singly else 0

    def _tell(
        self,
        channel: Channel,
        buffer: ReceiveBuffer,
        ranges: list[tuple[int, int]],
        sections: list[Section],
        payload: bytes,
    ) -> bool:
        """Sends a transfer page packet. If that fails, frees the sections and returns false."""
        try:
            channel.send(
                payload[: self.message_size],
                packet_type=PacketType.DATA_USING_XFER_PAGES,
                header=build_transfer_pages(buffer.set_id, ranges),
                on_completion=partial(self._returned, channel, buffer, sections),
                written=[span for section in sections for span in section.spans],
            )
        except (ChannelClosed, SendQueueFull, PacketTooBig):
            buffer.give(sections)
            return False
        return True

    def _returned(
        self,
        channel: Channel,
        buffer: ReceiveBuffer,
        sections: list[Section],
        payload: bytes | None,
    ) -> None:
        """Takes sections back: the guest is done with them, or its channel is closed."""
        buffer.give(sections)
        if payload is None:
            return
        if payload and (payload[:4] != _COMPLETE or len(payload) < 8):
            kind = int.from_bytes(payload[:4], "little")
            self._complain(channel, ReturnError("msg_type", kind, 0, "no receive completion"))
        self.go_on()

    def send_table(self) -> None:
        """Tells the guest to spread what it sends over all open channels."""
        count = max(1, len(self.channels))
        self._table = [number % count for number in range(nvsp.SEND_TABLE_SIZE)]
        self.repeat_table()

    def repeat_table(self) -> None:
        """Sends the guest the send table that it has, which changes nothing."""
        primary = self.channels.get(0)
        if primary is None or self.held:
            return
        try:
            primary.send(nvsp.indirection_table(self._table, self.message_size))
        except (ChannelClosed, SendQueueFull):
            return  # a guest that is about to go, or that does not listen
