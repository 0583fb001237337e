# SPDX-License-Identifier: GPL-2.0-or-later
"""Replies to each packet with the SHA-256 of the guest pages that it describes.

Try it: ``vhostvmbus try examples/pfn_digest.py:PfnDigest --pages 16``
"""

import hashlib
from uuid import UUID

from vhostvmbus.device import Channel, Device, Packet
from vhostvmbus.guest import Exchange


class PfnDigest(Device):
    """The guest's half is VmbPacketSendWithExternalPfns."""

    class_id = UUID("2d5bc5a2-4a86-4d0a-8b6f-3a0c9f1f6e57")
    max_external_data = 1 << 20

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Hashes the pages where they are, without a copy."""
        digest = hashlib.sha256()
        if packet.external_data is not None:
            for view in packet.external_data.views():
                digest.update(view)
        packet.complete(digest.digest())


def check(exchange: Exchange) -> bool:
    """What ``vhostvmbus try`` expects."""
    return exchange.completion == hashlib.sha256(exchange.before).digest()
