# SPDX-License-Identifier: GPL-2.0-or-later
"""Holds a channel where it is while its machine stands still; for the guest it stays open.

First the worker takes nothing more from the ring, and what it took is completed; then nothing goes
into the ring any more. Once :meth:`Standstill.wait` and :meth:`Standstill.keep_back` returned true,
neither the ring nor external data is touched until :meth:`Standstill.end`.
"""

from vhostvmbus.channel.completions import Completions
from vhostvmbus.channel.deadline import Deadline
from vhostvmbus.channel.quota import Quota
from vhostvmbus.channel.sender import Sender


class Standstill:
    """Holds one channel. Its caller takes turns."""

    def __init__(self, quota: Quota, sender: Sender, completions: Completions) -> None:
        self._quota = quota
        self._sender = sender
        self._completions = completions

    def begin(self) -> None:
        """Has the worker take no packet any more."""
        self._quota.hold(True)

    def wait(self, deadline: Deadline) -> bool:
        """Returns whether, before the deadline, every packet that was taken has been completed."""
        return self._quota.wait_until_held(self._completions.packets, deadline)

    def keep_back(self, deadline: Deadline) -> bool:
        """Keeps what is sent and completed from now on out of the ring.

        Returns false if somebody was sending and does not return before the deadline.
        """
        return self._sender.hold(deadline)

    def end(self) -> None:
        """Lets the channel go on as if nothing had been."""
        self._sender.let_go()
        self._quota.hold(False)
