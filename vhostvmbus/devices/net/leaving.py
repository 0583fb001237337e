# SPDX-License-Identifier: GPL-2.0-or-later
"""A card that is being unplugged: the guest's driver is brought to rest before it goes.

Linux waits for the completion of every packet that it has sent, but takes none any more once the
card is rescinded (:mod:`~vhostvmbus.devices.net.takeover`). So the guest is told that the link is
down, which makes it stop sending, and gets no frames any more, while everything that it sends is
completed as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from vhostvmbus.channel import Channel
from vhostvmbus.device import wait_until_quiet
from vhostvmbus.devices.net.outbox import Outbox
from vhostvmbus.devices.net.protocol import Protocol, Rndis
from vhostvmbus.devices.net.receiver import Receiver
from vhostvmbus.devices.net.takeover import LINK_CHANGE_SECONDS

log = logging.getLogger(__name__)


def begin(protocol: Protocol, outbox: Outbox, receivers: Sequence[Receiver]) -> bool:
    """The link is down from now on. Whether there is a driver to wait for.

    Under the card's lock. ``receivers`` drop what comes from the link until they get a buffer.
    """
    primary = outbox.channels.get(0)
    if primary is None:
        return False
    if protocol.rndis is not Rndis.INITIALIZED and not primary.info.resumed:
        return False  # one that was resumed is being taken over: it is told, and sends still
    for receiver in receivers:
        receiver.detach()
        receiver.wake()
    outbox.answer(protocol.link_changed(False))
    return True


def wait(name: str, outbox: Outbox) -> None:
    """Until the driver is at rest or has closed its channels; not for ever."""

    def channels() -> list[Channel]:
        outbox.go_on()  # the news itself may have to wait for a receive section
        return list(outbox.channels.values())

    quiet = wait_until_quiet(channels, LINK_CHANGE_SECONDS)
    if not quiet and outbox.channels:
        log.warning("%s: the guest's driver does not come to rest", name)
