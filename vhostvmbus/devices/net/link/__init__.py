# SPDX-License-Identifier: GPL-2.0-or-later
"""What a network card is connected to: the interface between the card and the world.

A :class:`Link` carries Ethernet frames, without frame check sequence, between one card and
something on the host. The card knows no more of the host than this file; a link knows nothing of
VMBus. Frames themselves pass in C, between the card and the link's ports
(:mod:`~vhostvmbus.devices.net.link.port`): a link says what is behind them.

Invariants: nothing waits for a frame's way; a frame that cannot be delivered is dropped and
counted, never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from vhostvmbus.devices.net.link.port import Port


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the host side takes (sending) and may be asked to give (receiving)."""

    checksum: bool = False
    tso4: bool = False
    tso6: bool = False


class LinkDown(OSError):
    """A link cannot be made or used; the message says why, and what would work, for the user."""


class Link(Protocol):
    """A connection of one card. Queues are numbered from 0."""

    @property
    def name(self) -> str:
        """For people: the interface's, or the kind of link."""

    @property
    def queues(self) -> int:
        """Most queues that :meth:`use_queues` takes."""

    @property
    def mtu(self) -> int:
        """Largest IP packet in bytes."""

    @property
    def mac(self) -> bytes | None:
        """The address that the card shall have, six bytes; None leaves the choice to the card."""

    @property
    def capabilities(self) -> Capabilities:
        """What may be left undone in frames that are sent, and asked for in those received."""

    def start(self, changed: Callable[[], None]) -> None:
        """Begin. ``changed()`` is called, on any thread, when carrier or MTU may have changed."""

    def carrier(self) -> bool:
        """Whether frames can pass."""

    def port(self, queue: int) -> Port:
        """Returns a queue's port: the same one for the link's life.

        No frame comes from it, and none is taken, while the link is down.
        """

    def use_queues(self, count: int) -> None:
        """Spread what is received over the first *count* queues (ValueError: 1 to ``queues``)."""

    def use_receive_offloads(self, wanted: Capabilities) -> None:
        """Frames with these offloads may be given from now on, and no others."""

    def set_mtu(self, mtu: int) -> None:
        """Make the host side's MTU *mtu* bytes. Raises OSError when that is impossible."""

    def stats(self) -> dict[str, int]:
        """Counters of what the link dropped or lost, ready for JSON."""

    def close(self) -> None:
        """End, and remove what was made for the card on the host; again does nothing.

        Nobody else uses the link any more.
        """
