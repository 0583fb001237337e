# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface between a network card and what it is connected to.

A :class:`Link` carries Ethernet frames, without frame check sequence, between one card and
something on the host. The card knows no more of the host than this file; a link knows nothing of
VMBus. Frames themselves pass in C, between the card and the link's ports
(:mod:`~vhostvmbus.devices.net.link.port`): a link says what is behind them.

Invariants: nothing blocks until a frame can go; a frame that cannot be delivered is dropped and
counted, never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vhostvmbus.devices.net.link.port import Port


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The work that the host side takes over (sending) and may be asked to leave undone
    (receiving).
    """

    checksum: bool = False
    tso4: bool = False
    tso6: bool = False

    def within(self, able: Capabilities) -> Capabilities:
        """Returns what is in both."""
        return Capabilities(
            self.checksum and able.checksum, self.tso4 and able.tso4, self.tso6 and able.tso6
        )


class LinkDown(OSError):
    """A link cannot be made or used; the message says why, and what would work, for the user."""


class Link(Protocol):
    """A connection of one card. Queues are numbered from 0."""

    @property
    def name(self) -> str:
        """The name for people: the interface's, or the kind of link."""

    @property
    def queues(self) -> int:
        """The most queues that :meth:`use_queues` takes."""

    @property
    def mtu(self) -> int:
        """The largest IP packet, in bytes."""

    @property
    def mac(self) -> bytes | None:
        """The address that the card shall have, six bytes; ``None`` leaves it to the card."""

    @property
    def capabilities(self) -> Capabilities:
        """The work that may be left undone in frames that are sent, and asked for in those
        received.
        """

    def start(self, changed: Callable[[], None]) -> None:
        """Begins. ``changed()`` is called, on any thread, when carrier or MTU may have changed."""

    def carrier(self) -> bool:
        """Tells whether frames can pass."""

    def port(self, queue: int) -> Port:
        """Returns a queue's port: the same one for the link's life.

        No frame comes from it, and none is taken, while the link is down.
        """

    def use_queues(self, count: int) -> None:
        """Spreads what is received over the first ``count`` queues.

        Raises ``ValueError`` unless there are as many.
        """

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Lets the link give frames with these offloads from now on, and no others."""

    def set_mtu(self, mtu: int) -> None:
        """Makes the host side's MTU ``mtu`` bytes. Raises ``OSError`` when that is impossible."""

    def stats(self) -> dict[str, int]:
        """Returns counters of what the link dropped or lost, ready for JSON."""

    def close(self) -> None:
        """Ends, and removes what was made for the card on the host; a second time it does nothing.

        Nobody else uses the link any more.
        """
