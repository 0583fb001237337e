# SPDX-License-Identifier: GPL-2.0-or-later
"""An open channel. Its worker thread, its packets, its sends, its quota, its end.

KMCL's VMBCHANNEL and VMBPACKET at the server endpoint (docs/kmcl.md); the ring protocol is
``ring``'s business.
"""

from vhostvmbus.channel.channel import Channel
from vhostvmbus.channel.gpadl import Gpadl, GpadlTable
from vhostvmbus.channel.handler import ChannelHandler
from vhostvmbus.channel.life import ChannelState
from vhostvmbus.channel.packet import Packet, PacketChannel
from vhostvmbus.channel.stats import ChannelStats

__all__ = [
    "Channel",
    "ChannelHandler",
    "ChannelState",
    "ChannelStats",
    "Gpadl",
    "GpadlTable",
    "Packet",
    "PacketChannel",
]
