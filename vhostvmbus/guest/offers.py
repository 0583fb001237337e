# SPDX-License-Identifier: GPL-2.0-or-later
"""Offers that come and go, on the front end's end of docs/vhost-user-vmbus.md.

A back end's request is noted and answered in the thread of the back-end channel; it is carried out
by a thread of its own, in order, because closing a channel takes requests the other way, which the
back end may answer only after it has got its answer.  Invariant: a channel that is rescinded has
been closed and its GPADLs torn down before :meth:`GuestOffers.wait_gone` returns.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import assert_never

from vhostvmbus.guest.errors import NotOffered
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.errors import Disconnected, RequestRefused
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.offer import Offer

log = logging.getLogger(__name__)

MOST_WAITING = 4096
"""Offers and rescinds that may wait to be carried out."""

ChannelOffer = m.OfferChannel | m.RescindChannel
"""The words of a back end about the channels that a guest may open."""


class GuestOffers:
    """The offers to a software guest. ``take_back`` closes and tears down a whole channel."""

    def __init__(self, take_back: Callable[[int], None]) -> None:
        self._take_back = take_back
        self._channels = self._max_channels = 1
        self._later: set[int] = set()
        self._withdrawn = False
        self._changed = threading.Condition()
        self._waiting: queue.Queue[ChannelOffer | None] = queue.Queue(MOST_WAITING)
        self._thread: threading.Thread | None = None

    def connecting(self) -> None:
        """Begins a new connection: the device is offered."""
        with self._changed:
            self._withdrawn = False
            self._changed.notify_all()

    def limit(self, offer: Offer) -> None:
        """Takes the back end's offer as the limit of what may be opened."""
        with self._changed:
            self._channels, self._max_channels = offer.channels, offer.max_channels
            self._changed.notify_all()

    def request(self, message: ChannelOffer) -> NtStatus:
        """Takes note of a back end's request; returns the status that answers it."""
        if message.channel >= self._max_channels > 1 or message.channel > 0xFFFF:
            return NtStatus.INVALID_PARAMETER
        try:
            self._waiting.put_nowait(message)
        except queue.Full:
            return NtStatus.INSUFFICIENT_RESOURCES
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="guest-offers", daemon=True)
            self._thread.start()
        return NtStatus.SUCCESS

    @property
    def offered(self) -> list[int]:
        """The channels that the guest may open."""
        with self._changed:
            return [] if self._withdrawn else [*range(self._channels), *sorted(self._later)]

    def require(self, index: int) -> None:
        """Raises :class:`NotOffered` unless the channel is offered."""
        if index not in self.offered:
            raise NotOffered(f"channel {index} is not offered")

    def wait(self, index: int, timeout: float) -> None:
        """Waits until the channel is offered. Raises :class:`NotOffered` after ``timeout``."""
        with self._changed:
            if not self._changed.wait_for(lambda: index in self.offered, timeout):
                raise NotOffered(f"channel {index} was not offered in {timeout:g} s")

    def wait_gone(self, index: int, timeout: float) -> None:
        """Waits until the channel is not offered (any more). Raises ``TimeoutError``."""
        with self._changed:
            if not self._changed.wait_for(lambda: index not in self.offered, timeout):
                raise TimeoutError(f"channel {index} is still offered after {timeout:g} s")

    def end_subchannels(self) -> list[int]:
        """Ends the offers of subchannels, as the guest closed channel 0 or reset; returns which."""
        with self._changed:
            gone = sorted(self._later, reverse=True)
            self._later.clear()
            self._changed.notify_all()
            return gone

    def close(self) -> None:
        """Ends the thread, after what waits."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (message := self._waiting.get()) is not None:
            try:
                self._carry_out(message)
            except (Disconnected, RequestRefused) as error:
                log.warning("%s: %s", type(message).__name__, error)

    def _carry_out(self, message: ChannelOffer) -> None:
        match message:
            case m.OfferChannel(0):
                with self._changed:
                    self._withdrawn = False
                    self._changed.notify_all()
            case m.OfferChannel(index):
                with self._changed:
                    if not self._withdrawn and self._channels <= index < self._max_channels:
                        self._later.add(index)
                    self._changed.notify_all()
            case m.RescindChannel(index):
                self._rescind([index] if index else [*reversed(self.offered)])
                with self._changed:
                    self._withdrawn = self._withdrawn or index == 0
                    self._changed.notify_all()
            case _:
                assert_never(message)

    def _rescind(self, indices: list[int]) -> None:
        for index in indices:
            try:
                self._take_back(index)
            finally:
                with self._changed:
                    self._later.discard(index)
                    self._changed.notify_all()
