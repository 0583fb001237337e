# SPDX-License-Identifier: GPL-2.0-or-later
"""Closed channels of which somebody who does not return has something in his hands."""

from vhostvmbus.channel import Channel, GpadlTable
from vhostvmbus.channel.deadline import MAX_LEFT_BEHIND, LeftBehind
from vhostvmbus.wire.errors import DeviceBusy, ThreadLimit


class Lingering:
    """The closed channels of one device whose eventfds, rings or data are in use still."""

    def __init__(self, left: LeftBehind) -> None:
        self._left = left
        self._channels: list[Channel] = []

    def add(self, channel: Channel) -> None:
        """Keeps a channel that was closed, if anything of it is in use."""
        if channel.end.left or channel.end.transferring():
            self._channels.append(channel)

    def check(self, gpadls: GpadlTable) -> None:
        """Gives up what is not in use any more.

        Raises :exc:`ThreadLimit` if too much is, and :exc:`DeviceBusy` while a transfer of a closed
        channel, or with a removed GPADL, goes on: it must not overtake what the guest does next.
        """
        self._channels = [
            channel
            for channel in self._channels
            if not channel.end.let_go() or channel.end.transferring()
        ]
        self._left.check()
        if len(self._channels) >= MAX_LEFT_BEHIND:
            raise ThreadLimit(f"{len(self._channels)} closed channels are in use still")
        if gpadls.transferring() or any(each.end.transferring() for each in self._channels):
            raise DeviceBusy("a transfer from before has not ended")
