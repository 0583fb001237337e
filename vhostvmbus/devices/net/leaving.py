# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a card that its guest is to lose: the driver stops sending before it goes.

Linux waits for the completion of every packet that it has sent, but takes none any more once the
card is rescinded (:mod:`~vhostvmbus.devices.net.takeover`). So the guest is told that the link is
down, which makes it stop sending, and gets no frames any more, while everything that it sends is
completed as ever.

Patience is counted in time in which the guest can act: a machine that is stopped in the middle uses
none of it, and goes on where it was.
"""

from __future__ import annotations

import logging
import time
from typing import Final

from vhostvmbus.channel import Channel, ChannelState
from vhostvmbus.device import GuestClock, wait_until_quiet
from vhostvmbus.devices.net.outbox import Outbox
from vhostvmbus.devices.net.protocol import Protocol, Rndis

log = logging.getLogger(__name__)

LINK_CHANGE_SECONDS: Final = 2.2
"""The seconds that Linux may take to act on a change of the link (``LINKCHANGE_INT`` is 2 s)."""
AGAIN_SECONDS: Final = 0.2
"""The seconds after which such a guest is sent something once more: whether it takes that shows
whether it runs."""
PATIENCE_SECONDS: Final = 4.0
"""The seconds that it may go on sending after that; then the card is taken all the same."""
_POLL_SECONDS: Final = 0.02


def has_driver(protocol: Protocol, outbox: Outbox) -> bool:
    """Tells whether there is a driver that would have to be told, and waited for."""
    primary = outbox.channels.get(0)
    if primary is None:
        return False
    # One that was resumed is being taken over: it is told, and sends still.
    return protocol.rndis is Rndis.INITIALIZED or primary.info.resumed


def wait(name: str, outbox: Outbox, *, told: bool) -> None:
    """Waits until the driver is quiet or has closed its channels.

    That is not for ever, if the guest runs. ``told`` if it was told just now that the link is down,
    which it has to have time for.
    """

    def channels() -> list[Channel]:
        outbox.go_on()  # the news itself may have to wait for a receive section
        return list(outbox.channels.values())

    clock = GuestClock(channels)
    if told:
        _wait_for_reaction(outbox, clock)
    quiet = wait_until_quiet(channels, 0.0, PATIENCE_SECONDS, clock=clock)
    if not quiet and outbox.channels:
        log.warning("%s: the guest's driver does not come to rest", name)


def _wait_for_reaction(outbox: Outbox, clock: GuestClock) -> None:
    begin = sent = clock()
    while (now := clock()) - begin < LINK_CHANGE_SECONDS:
        primary = outbox.channels.get(0)
        if primary is None or primary.stopping or primary.state is not ChannelState.RUNNING:
            return
        if now - sent >= AGAIN_SECONDS:
            outbox.repeat_table()
            sent = clock()
        time.sleep(_POLL_SECONDS)
