# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a card that is being unplugged: the guest's driver stops sending before it goes.

Linux waits for the completion of every packet that it has sent, but takes none any more once the
card is rescinded (:mod:`~vhostvmbus.devices.net.takeover`). So the guest is told that the link is
down, which makes it stop sending, and gets no frames any more, while everything that it sends is
completed as ever.
"""

from __future__ import annotations

import logging

from vhostvmbus.channel import Channel
from vhostvmbus.device import wait_until_quiet
from vhostvmbus.devices.net.outbox import Outbox
from vhostvmbus.devices.net.protocol import Protocol, Rndis
from vhostvmbus.devices.net.takeover import LINK_CHANGE_SECONDS

log = logging.getLogger(__name__)


def has_driver(protocol: Protocol, outbox: Outbox) -> bool:
    """Tells whether there is a driver that would have to be told, and waited for."""
    primary = outbox.channels.get(0)
    if primary is None:
        return False
    # One that was resumed is being taken over: it is told, and sends still.
    return protocol.rndis is Rndis.INITIALIZED or primary.info.resumed


def wait(name: str, outbox: Outbox) -> None:
    """Waits until the driver is quiet or has closed its channels, for a bounded time."""

    def channels() -> list[Channel]:
        outbox.go_on()  # the news itself may have to wait for a receive section
        return list(outbox.channels.values())

    quiet = wait_until_quiet(channels, LINK_CHANGE_SECONDS)
    if not quiet and outbox.channels:
        log.warning("%s: the guest's driver does not come to rest", name)
