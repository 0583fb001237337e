# SPDX-License-Identifier: GPL-2.0-or-later
"""One packet between its reception and its completion.

KMCL's VMBPACKET at the server endpoint: docs/kmcl.md names the counterparts.
"""

from vhostvmbus.packet.packet import Packet, PacketOwner

__all__ = ["Packet", "PacketOwner"]
