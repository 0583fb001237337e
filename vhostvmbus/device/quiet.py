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


def _alive(channels: Sequence[Channel]) -> list[Channel]:
    """Returns those of the channels on which the guest can do something still."""
    return [
        channel
        for channel in channels
        if channel.state is ChannelState.RUNNING and not channel.stopping
    ]


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


class GuestClock:
    """The seconds in which a guest could act, for whoever is patient with it.

    A front end may say that the guest is stopped; then the clock stands still. Else one that is
    stopped leaves in its rings what is put there. As long as something lies there and nothing else
    happens either, the clock stands still, too. A guest that has nothing to take cannot be told
    from one that is stopped: whoever waits sends something now and then.
    """

    def __init__(self, channels: Callable[[], Sequence[Channel]]) -> None:
        self._channels = channels
        self._seconds = 0.0
        self._looked_at = time.monotonic()
        self._before: tuple[int, ...] = ()
        self._lay = 0

    def __call__(self) -> float:
        """Returns the seconds so far; to be called often, for it sees only what changes between."""
        now = time.monotonic()
        alive = _alive(self._channels())
        held = any(each.held for each in alive)
        rings = [
            (each.stats.packets_received, ring.tx_free, ring.tx_size - ring.tx_free)
            for each in alive
            if (ring := each.ring_state) is not None
        ]
        lies = sum(pending for _, _, pending in rings)
        seen = tuple(part for came, free, _ in rings for part in (came, free))
        if not held and (not (lies and self._lay) or seen != self._before):
            self._seconds += now - self._looked_at
        self._looked_at, self._before, self._lay = now, seen, lies
        return self._seconds


def wait_until_quiet(
    channels: Callable[[], Sequence[Channel]],
    least: float,
    patience: float = PATIENCE_SECONDS,
    *,
    calm: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Waits until the guest sends nothing any more and has taken every completion.

    Waits ``least`` seconds at any rate, and ``patience`` at most; it does not wait for a channel
    that closes meanwhile. ``calm`` is for how many seconds nothing has to come, by default 0.3.
    With a :class:`GuestClock` for ``clock`` all of this is time in which the guest can act.
    Returns whether the guest became quiet.
    """
    calm = CALM_SECONDS if calm is None else calm
    begin = calm_since = clock()
    before = -1
    while (now := clock()) - begin < patience:
        alive = _alive(channels())
        if not alive:
            return False
        came, pending = _activity(alive)
        if came != before or pending:
            before, calm_since = came, now
        elif now - calm_since >= calm and now - begin >= least:
            return True
        time.sleep(_POLL_SECONDS)
    return False
