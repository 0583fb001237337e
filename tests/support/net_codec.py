# SPDX-License-Identifier: GPL-2.0-or-later
"""A card's state without a card, for tests of the network codecs."""

from __future__ import annotations

from vhostvmbus.devices.net.link import Capabilities
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.devices.net.rss import ReceiveScaling
from vhostvmbus.devices.net.statistics import Counters

MAC = bytes.fromhex("020000000001")


def adapter(
    able: Capabilities | None = None, channels: int = 4, counters: Counters | None = None
) -> Adapter:
    """Returns the first state of a card with four queues on a link that can do everything."""
    return Adapter(
        MAC,
        1500,
        able or Capabilities(True, True, True),
        ReceiveScaling(channels),
        lambda: counters or Counters(),
        connected=True,
    )
