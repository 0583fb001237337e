# SPDX-License-Identifier: GPL-2.0-or-later
"""The protocol of a back end: what a connection calls to have the front end's requests done.

These are :class:`typing.Protocol` classes, so that this room knows nothing of the rooms above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import SharedRegion

Invalidate = Callable[[list[tuple[int, int]]], None]
"""Blocks until the front end has discarded its translations of these ``(guest_phys_addr, size)``
ranges, any number of them.
"""

ChannelRequest = Callable[[int], None]
"""Asks the front end to offer, or to rescind, the channel of this index.

Returns when the front end has taken note. Raises :class:`~vhostvmbus.wire.errors.OfferRefused`.
"""


class Inflight(Protocol):
    """An in-flight region: ``channels`` parts with ``slots`` slots each, ``size`` bytes in all."""

    fd: int
    offset: int
    channels: int
    slots: int

    @property
    def size(self) -> int:
        """The region's size in bytes, from ``offset`` on."""


class Offers(Protocol):
    """The place for what a back end needs to change its offers; ``None`` without a connection."""

    offer_channel: ChannelRequest | None
    rescind_channel: ChannelRequest | None


class BackEnd(Protocol):
    """One device, as a connection sees it.

    Methods are called from the server's thread, one at a time. To refuse, a method raises
    :class:`~vhostvmbus.wire.errors.FrontEndError` (with ``status``), and has changed nothing then.
    Descriptors stay the caller's: a back end that keeps one duplicates it.
    """

    invalidate: Invalidate | None

    @property
    def offers(self) -> Offers:
        """The place that a connection gives its two requests to, :class:`Offers`."""

    def connected(self) -> None:
        """Notes that the back-end channel may be used from now on."""

    def offer(self) -> Offer:
        """Returns what the device offers; the same for as long as the device lives."""

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> object:
        """Maps a region of guest memory."""

    def remove_region(self, guest_phys_addr: int, size: int) -> None:
        """Unmaps a region of guest memory. Returns when nothing refers to it any more."""

    def set_memory_table(self, table: Sequence[SharedRegion]) -> None:
        """Makes these the regions of guest memory, all of them or none."""

    def gpadl_create(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> None:
        """Makes a GPADL: gives guest pages a handle."""

    def gpadl_teardown(self, channel: int, gpadl_id: int) -> None:
        """Tears a GPADL down, and closes the channel whose ring it is."""

    def open_channel(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
        """Opens a channel. Raises :class:`~vhostvmbus.wire.errors.RefuseOpen` as well."""

    def close_channel(self, index: int) -> None:
        """Closes a channel. Returns when nothing touches its ring or external data any more."""

    def modify_channel(self, index: int, target_vp: int) -> None:
        """Notes that the guest moved the channel's interrupt to another virtual processor."""

    def set_code_map(
        self, fd: int, map_bytes: int, regions: Sequence[tuple[int, int, int]]
    ) -> None:
        """Sets where to look before a completion is published (*Translated code*)."""

    def make_inflight(self, channels: int) -> Inflight:
        """Makes a new in-flight region. Its descriptor stays the back end's."""

    def adopt_inflight(self, fd: int, size: int, offset: int, channels: int, slots: int) -> None:
        """Takes over the in-flight region of the back end before this one."""

    def reset(self) -> None:
        """Closes every channel and forgets every GPADL."""

    def suspend(self) -> None:
        """Has all open channels stand still. Returns when nothing touches guest memory any more."""

    def go_on(self) -> None:
        """Has the channels that stand still go on."""

    def unplug(self) -> None:
        """Notes that the device is about to be taken from the guest. Returns at once.

        The back end has channel 0 rescinded when the guest can do without it.
        """

    def disconnect(self) -> None:
        """Forgets everything that came from the front end, which has gone."""
