# SPDX-License-Identifier: GPL-2.0-or-later
"""The quota of outstanding packets; a pause is a quota of 0 that somebody waits for.

A pause is the device's. The quota is 0, too, while the channel is held because the guest's machine
stands still. Invariants: :attr:`Quota.now` is 0 while the channel is paused or held, else
:attr:`Quota.wanted`; all fields change under :attr:`ChannelLife.idle`, and the worker reads them
without it; either is complete when the worker rests (it saw the quota of 0 with nothing in its
hands) and nothing is outstanding; a worker that rests does not touch the ring while it is held.
"""

import time
from collections.abc import Sized

from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.channel.life import ChannelLife, ChannelState
from vhostvmbus.wire.errors import ChannelClosed


class Quota:
    """A bound on how many packets of one channel may be outstanding."""

    def __init__(self, quota: int, life: ChannelLife) -> None:
        self.now = self.wanted = quota
        self.paused = False
        self.held = False
        self.starved = False
        """Set while the worker waits for a packet to end: who ends one has to wake it."""
        self._resting = False  # paused or held, and the worker has seen it
        self._life = life

    def set(self, quota: int) -> None:
        """Changes the quota; while paused, what it will be afterwards."""
        if quota < 1:
            raise ValueError("the transaction quota must be at least 1")
        with self._life.idle:
            self.wanted = quota
            self._settle()

    def _settle(self) -> None:
        self.now = 0 if self.paused or self.held else self.wanted

    def pause(self, timeout: float | None, outstanding: Sized) -> None:
        """See :meth:`Channel.pause`; the caller may wait until nothing is ``outstanding``."""
        life = self._life
        with life.idle:
            self.paused = True
            self._resting = False
            self._settle()
        life.wake()
        deadline = None if timeout is None else time.monotonic() + timeout
        with life.idle:
            while self.paused and life.state is not ChannelState.OPENING:
                if life.state is not ChannelState.RUNNING or life.stopping:
                    raise ChannelClosed(f"channel {life.name} ended before it was paused")
                if self._resting and not outstanding:
                    return
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"{len(outstanding)} packets are not completed")
                life.idle.wait(left)

    def start(self) -> None:
        """See :meth:`Channel.start`."""
        with self._life.idle:
            self.paused = self._resting = False
            self._settle()
            self._life.idle.notify_all()
        self._life.wake()

    def hold(self, held: bool) -> None:
        """Lets the worker take nothing more, or go on; see :meth:`wait_until_held`."""
        with self._life.idle:
            self.held = held
            self._resting = False
            self._settle()
        self._life.wake()

    def wait_until_held(self, outstanding: Sized, deadline: Deadline) -> bool:
        """Returns whether, before the deadline, the worker rests and nothing is ``outstanding``."""
        life = self._life
        with life.idle:
            while True:
                rests = self._resting or life.state is not ChannelState.RUNNING
                if rests and not outstanding:
                    return True
                left = deadline.left
                if left <= 0:
                    return False
                life.idle.wait(left)

    @property
    def still(self) -> bool:
        """Tells whether the worker is to leave the ring alone."""
        return self.held and self._resting

    def reached(self) -> None:
        """Notes that the worker has nothing in its hands and takes nothing more for now."""
        if not (self.paused or self.held):
            self._life.stats.quota_reached += 1
            return
        with self._life.idle:
            self._resting = True
            self._life.idle.notify_all()

    def packet_ended(self) -> None:
        """Wakes those who wait for a packet to end, once one has; any thread."""
        if self.starved:
            self._life.wake()
        if self._life.stopping or self.paused or self.held:
            self._life.notify()
