# SPDX-License-Identifier: GPL-2.0-or-later
"""What a connection needs of whoever carries its requests out.

A protocol, so that this room knows nothing of the rooms above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import SharedRegion

#: Blocks until the front end has discarded its translations of these
#: ``(guest_phys_addr, size)`` ranges, any number of them.
Invalidate = Callable[[list[tuple[int, int]]], None]

#: Returns when the front end has taken note that this channel is to be offered, or taken back;
#: raises :class:`~vhostvmbus.wire.errors.OfferRefused`.
ChannelRequest = Callable[[int], None]


class Inflight(Protocol):
    """An in-flight region: `channels` parts with `slots` slots each, `size` bytes in all."""

    fd: int
    offset: int
    channels: int
    slots: int

    @property
    def size(self) -> int:
        """Bytes from `offset` on."""


class Offers(Protocol):
    """Where a back end finds what it needs to change its offers; None without a connection."""

    offer_channel: ChannelRequest | None
    rescind_channel: ChannelRequest | None


class BackEnd(Protocol):
    """One device.

    Methods are called from the server's thread, one at a time.  They raise
    :class:`~vhostvmbus.wire.errors.FrontEndError` (with ``status``) to refuse, and have
    changed nothing then; descriptors stay the caller's, a back end that keeps one duplicates it.
    """

    invalidate: Invalidate | None

    @property
    def offers(self) -> Offers:
        """What is offered."""

    def connected(self) -> None:
        """The back-end channel may be used from now on."""

    def offer(self) -> Offer:
        """What the device offers; the same for as long as the device lives."""

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> object:
        """Map a region of guest memory."""

    def remove_region(self, guest_phys_addr: int, size: int) -> None:
        """Unmap a region; returns when nothing refers to it any more."""

    def set_memory_table(self, table: Sequence[SharedRegion]) -> None:
        """Make these the regions, all of them or none."""

    def gpadl_create(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> None:
        """Give guest pages a handle."""

    def gpadl_teardown(self, channel: int, gpadl_id: int) -> None:
        """Take the handle back; closes the channel whose ring it is."""

    def open_channel(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
        """Open a channel.  Raises :class:`~vhostvmbus.wire.errors.RefuseOpen` as well."""

    def close_channel(self, index: int) -> None:
        """Returns when nothing touches the channel's ring or external data any more."""

    def modify_channel(self, index: int, target_vp: int) -> None:
        """The guest moved the channel's interrupt."""

    def set_code_map(
        self, fd: int, map_bytes: int, regions: Sequence[tuple[int, int, int]]
    ) -> None:
        """Where to look before a completion is published ("Translated code")."""

    def make_inflight(self, channels: int) -> Inflight:
        """A new in-flight region; its descriptor stays the back end's."""

    def adopt_inflight(self, fd: int, size: int, offset: int, channels: int, slots: int) -> None:
        """The in-flight region of the back end before."""

    def reset(self) -> None:
        """Close every channel and forget every GPADL."""

    def unplug(self) -> None:
        """The device is about to be taken from the guest.  Returns at once; has channel 0
        rescinded when the guest can do without it."""

    def disconnect(self) -> None:
        """The front end has gone: forget everything that came from it."""
