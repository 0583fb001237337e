# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface that a channel needs of the floor above."""

from typing import Protocol, TypeVar

from vhostvmbus.channel.deadline import LeftBehind
from vhostvmbus.channel.packet import Packet
from vhostvmbus.memory import WrittenMemory
from vhostvmbus.ring import PacketLimits
from vhostvmbus.wire.errors import GuestError, PacketError

AnyChannel = TypeVar("AnyChannel", contravariant=True)
"""The type of the channel that the callbacks get: the :class:`~vhostvmbus.channel.Channel`."""


class ChannelHandler(Protocol[AnyChannel]):
    """The device's side of a channel. Callbacks come on the channel's worker thread."""

    name: str
    limits: PacketLimits
    transaction_quota: int
    gather_completions: bool
    gather_microseconds: int
    left: LeftBehind
    """The threads of the device that do not return."""
    written: WrittenMemory
    """The tracker that what was written is reported to, before the guest is told of it."""

    def packet_received(self, channel: AnyChannel, packet: Packet) -> None:
        """Called when a packet arrived."""

    def packet_rejected(self, channel: AnyChannel, packet: Packet, error: PacketError) -> None:
        """Called for a packet whose external data or size is wrong; it has no external data."""

    def processing_complete(self, channel: AnyChannel, count: int) -> None:
        """Called when the ring has run empty after ``count`` packets."""

    @property
    def wants_processing_complete(self) -> bool:
        """Tells whether :meth:`processing_complete` does anything."""

    def channel_failed(self, channel: AnyChannel, error: GuestError) -> None:
        """Called when the channel stopped for good because of ``error``."""
