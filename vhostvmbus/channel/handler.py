# SPDX-License-Identifier: GPL-2.0-or-later
"""What a channel needs from the floor above."""

from typing import Protocol, TypeVar

from vhostvmbus.channel.packet import Packet
from vhostvmbus.memory import WrittenMemory
from vhostvmbus.ring import PacketLimits
from vhostvmbus.wire.errors import GuestError, PacketError

AnyChannel = TypeVar("AnyChannel", contravariant=True)
"""What the callbacks get as their channel: the :class:`~vhostvmbus.channel.Channel`."""


class ChannelHandler(Protocol[AnyChannel]):
    """The device's side of a channel. Callbacks come on the channel's worker thread."""

    name: str
    limits: PacketLimits
    transaction_quota: int
    gather_completions: bool
    gather_microseconds: int
    written: WrittenMemory
    """Is told what was written, before the guest is told of it."""

    def packet_received(self, channel: AnyChannel, packet: Packet) -> None:
        """A packet arrived."""

    def packet_rejected(self, channel: AnyChannel, packet: Packet, error: PacketError) -> None:
        """A packet arrived whose external data or size is wrong; it carries no external data."""

    def processing_complete(self, channel: AnyChannel, count: int) -> None:
        """The ring has run empty after ``count`` packets."""

    @property
    def wants_processing_complete(self) -> bool:
        """Tells whether anybody listens to that."""

    def channel_failed(self, channel: AnyChannel, error: GuestError) -> None:
        """The channel stopped for good because of ``error``."""
