# SPDX-License-Identifier: GPL-2.0-or-later
"""Waits until a guest's driver is quiet, before its device is taken from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from vhostvmbus.channel import Channel, ChannelState

CALM_SECONDS: Final = 0.3
"""How many seconds a driver's rings have to be empty before it counts as quiet."""
PATIENCE_SECONDS: Final = 6.0
"""The seconds after which the device is taken all the same: a front end waits no longer than 10."""
_POLL_SECONDS: Final = 0.02


def _activity(channels: Sequence[Channel]) -> tuple[int, int]:
    """Returns how many packets came so far, and what is pending: bytes in rings, and packets."""
    came = pending = 0
    for channel in channels:
        ring = channel.ring_state
        came += channel.stats.packets_received
        pending += channel.outstanding
        if ring is not None:
            pending += ring.rx_available + ring.tx_size - ring.tx_free
    return came, pending


def wait_until_quiet(
    channels: Callable[[], Sequence[Channel]],
    least: float,
    patience: float = PATIENCE_SECONDS,
    *,
    calm: float | None = None,
) -> bool:
    """Waits until the guest sends nothing any more and has taken every completion.

    Waits ``least`` seconds at any rate, and ``patience`` at most; it does not wait for a channel
    that is closed meanwhile. ``calm`` is for how many seconds nothing has to come, by default 0.3.
    Returns whether the guest became quiet.
    """
    calm = CALM_SECONDS if calm is None else calm
    begin = calm_since = time.monotonic()
    before = -1
    while (now := time.monotonic()) - begin < patience:
        alive = [channel for channel in channels() if channel.state is ChannelState.RUNNING]
        if not alive:
            return False
        came, pending = _activity(alive)
        if came != before or pending:
            before, calm_since = came, now
        elif now - calm_since >= calm and now - begin >= least:
            return True
        time.sleep(_POLL_SECONDS)
    return False
