# SPDX-License-Identifier: GPL-2.0-or-later
"""The channels that a device has on offer, and the requests that change it.

docs/vhost-user-vmbus.md, *Offers that come and go*. Invariants: a subchannel is handed out once
until it is rescinded, channel 0 closes, or the guest or the connection is reset; a request is
carried out by the front end in the order of the calls here.

The lock is held while the front end's answer is awaited. It answers without waiting for this end,
so the thread that serves it may wait for the lock as well.
"""

import threading
from collections.abc import Callable

from vhostvmbus.wire.errors import OfferRefused, UsageError
from vhostvmbus.wire.ntstatus import NtStatus

ChannelRequest = Callable[[int], None]


class ChannelOffers:
    """The offers of one device: ``channels`` from the start, at most ``max_channels``.

    ``offer_channel`` and ``rescind_channel`` send the request for an index to the front end and
    return when it has taken note; they are ``None`` while there is no front end. Thread-safe.
    """

    def __init__(self, channels: int, max_channels: int) -> None:
        self.offer_channel: ChannelRequest | None = None
        self.rescind_channel: ChannelRequest | None = None
        self._later = range(channels, max_channels)
        self._lock = threading.Lock()
        self._offered: set[int] = set()
        self._rescinded = False

    @property
    def offered(self) -> list[int]:
        """The subchannels that were offered later and are on offer still, ascending."""
        return sorted(self._offered)

    @property
    def rescinded(self) -> bool:
        """Tells whether the whole device is rescinded."""
        return self._rescinded

    def add(self, count: int) -> list[int]:
        """Offers ``count`` subchannels more and returns their indices.

        If one is refused, none is offered: raises :exc:`OfferRefused`.
        """
        with self._lock:
            if self._rescinded:
                raise OfferRefused(
                    "the device itself is not offered", NtStatus.INVALID_DEVICE_STATE
                )
            free = [index for index in self._later if index not in self._offered]
            if not 0 <= count <= len(free):
                raise OfferRefused(
                    f"{count} channels more: there may be {len(free)} more",
                    NtStatus.INSUFFICIENT_RESOURCES,
                )
            done: list[int] = []
            try:
                for index in free[:count]:
                    _ask(self.offer_channel, index)
                    done.append(index)
            except OfferRefused:
                for index in done:
                    _ask(self.rescind_channel, index)
                raise
            self._offered.update(done)
            return done

    def take_back(self, index: int) -> None:
        """Rescinds a subchannel that was offered later. Raises :exc:`OfferRefused`."""
        if index not in self._later:
            raise UsageError(f"channel {index} is none that is offered later")
        with self._lock:
            _ask(self.rescind_channel, index)
            self._offered.discard(index)

    def rescind(self) -> None:
        """Rescinds the device, until :meth:`offer_again`; without a front end, for the next one.

        Raises :exc:`OfferRefused` if the front end cannot do it, or leaves just now. The device is
        as it was then, for the front ends to come, too.
        """
        with self._lock:
            if self.rescind_channel is not None:
                _ask(self.rescind_channel, 0)
            self._rescinded = True
            self._offered.clear()

    def offer_again(self) -> None:
        """Offers a device anew that was rescinded.

        Raises :exc:`OfferRefused` if the front end cannot do it; the next one has the device.
        """
        with self._lock:
            self._rescinded = False
            if self.offer_channel is not None:
                _ask(self.offer_channel, 0)

    def let_go(self) -> None:
        """Has a front end that is unplugging the device rescind it now.

        The next front end finds the device offered. Raises :exc:`OfferRefused`.
        """
        with self._lock:
            _ask(self.rescind_channel, 0)
            self._offered.clear()

    # -- what the front end says ---------------------------------------------------------------

    def connected(self) -> None:
        """Notes that a front end is there.

        To it the device is on offer, so it is asked to rescind a device that is not.
        """
        with self._lock:
            if self._rescinded:
                _ask(self.rescind_channel, 0)

    def opened(self, index: int) -> None:
        """Notes that the guest has this channel, which an earlier back end may have offered."""
        with self._lock:
            if index in self._later:
                self._offered.add(index)

    def forget(self) -> None:
        """Forgets subchannels: channel 0 was closed, or the guest or the connection begins anew."""
        with self._lock:
            self._offered.clear()


def _ask(request: ChannelRequest | None, index: int) -> None:
    if request is None:
        raise OfferRefused("there is no front end", NtStatus.DEVICE_NOT_CONNECTED)
    request(index)
