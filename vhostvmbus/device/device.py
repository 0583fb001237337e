# SPDX-License-Identifier: GPL-2.0-or-later
"""The class that devices derive from. Its attributes describe a device, its methods are callbacks.

The names and the order of the callbacks are KMCL's (VmbChannelInitSet...Callbacks): ``opened``,
``started``, ``post_started``, ``packet_received`` ..., ``suspended``, ``closed``.
"""

from collections.abc import Coroutine
from typing import Any
from uuid import UUID

from vhostvmbus.channel import Channel, Packet
from vhostvmbus.device.offers import ChannelOffers
from vhostvmbus.wire.errors import PacketError, UsageError


class Device:
    """One VMBus device. Derive from it, set ``class_id``, write ``packet_received``.

    Callbacks of one channel come one at a time: packets on the channel's worker thread, the others
    each on a thread of its own. ``opened``, ``resumed``, ``started``, ``suspended`` and ``closed``
    of all channels come one at a time, too, and have seconds to return: the front end waits. A
    thread that does not return is left behind, and what it was given is taken from it; there may be
    64 of them, then no channel is opened any more. Channels run at the same time as each other.
    """

    class_id: UUID
    """The interface type, by which a guest's driver binds."""
    instance_id: UUID | None = None
    """The id of this instance; ``None`` leaves the choice to the front end."""
    name: str = ""
    """The name in logs, statistics and of threads; the class's name if empty."""
    channel_flags: int = 0
    """The :class:`~vhostvmbus.wire.vmbus.ChannelFlag` bits of the offer."""
    mmio_megabytes: int = 0
    """The MMIO space that the guest is to reserve, in MiB."""
    user_defined: bytes = b""
    """Up to 120 bytes in the offer; their meaning is the class's."""
    channels: int = 1
    """How many channels are offered at start."""
    max_channels: int = 1
    """How many channels there may be, with the subchannels that are offered later."""

    max_packet_size: int = 0xFFFF * 8
    """The longest payload in bytes; a longer one goes to :meth:`packet_rejected`."""
    max_external_data: int = 16 << 20
    """The most bytes that one packet may describe by GPA ranges."""
    max_external_ranges: int = 4096
    """The most GPA ranges in one packet."""
    transaction_quota: int = 1024
    """The most packets outstanding on a channel; further ones wait in the ring."""
    gather_completions: bool = False
    """Set to publish completions made inside ``packet_received`` together, some at a time. That is
    cheaper, and only for devices whose ``packet_received`` never blocks for long.
    """
    gather_microseconds: int = 0
    """A time within which packets count as a stream, for a device with a plan; 0 for never.

    As long as several packets come in such a time (the kernel adds some 50 us), they are taken
    together, without signals.
    """

    _offers: ChannelOffers | None = None

    def serve_with(self, offers: ChannelOffers) -> None:
        """Gives the device its offers; called by whoever drives it, before anything else."""
        self._offers = offers

    @property
    def offers(self) -> ChannelOffers:
        """The offers of this device as they are now. Raises :exc:`UsageError` while nobody serves
        it.
        """
        if self._offers is None:
            raise UsageError(f"nobody serves {self.name or type(self).__name__}")
        return self._offers

    def offer_channels(self, count: int) -> list[int]:
        """Offers the guest ``count`` subchannels more. Returns their indices, from ``channels`` on.

        May be called from any thread, from :meth:`packet_received` too. Each subchannel comes as
        :meth:`opened` when, and if, the guest opens it, and has a worker thread of its own. They
        are gone when channel 0 is closed, and when the guest resets. Raises :exc:`OfferRefused`,
        with nothing offered then.
        """
        return self.offers.add(count)

    def rescind_channel(self, index: int) -> None:
        """Rescinds a subchannel that was offered later; idempotent.

        If the subchannel is open, :meth:`closed` comes afterwards. Raises :exc:`OfferRefused`.
        """
        self.offers.take_back(index)

    def rescind(self) -> None:
        """Rescinds the whole device, until :meth:`offer_again`; idempotent.

        Every channel that is open is closed, subchannels first. Without a front end, the next one
        is asked to do it. Raises :exc:`OfferRefused` if the one that is there cannot do it, or
        leaves just now: then nothing has changed, and the next one finds the device on offer.
        """
        self.offers.rescind()

    def offer_again(self) -> None:
        """Undoes :meth:`rescind`, for the guest that runs and for those to come.

        Raises :exc:`OfferRefused` if the front end cannot do it; the next one has the device.
        """
        self.offers.offer_again()

    def opened(self, channel: Channel) -> None:
        """Called when the guest opens the channel. Raise :exc:`RefuseOpen` to refuse. No packet may
        be sent yet.
        """

    def resumed(self, channel: Channel) -> None:
        """Called in the place of :meth:`opened` when the guest has had the channel open all along
        and only the connection to the front end is new.
        """

    def started(self, channel: Channel) -> None:
        """Called when packets may be sent from now on, but they must not be waited for here."""

    def post_started(self, channel: Channel) -> None:
        """Called like :meth:`started`, and may wait for packets: it has its own thread."""

    def packet_received(self, channel: Channel, packet: Packet) -> Coroutine[Any, Any, None] | None:
        """Called for each packet. Complete it here, or later from any thread, exactly once.

        May be an ``async def``: then it runs on the device's event loop. An exception stops the
        channel. The default completes with an empty payload.
        """
        packet.complete()
        return None

    def packet_rejected(self, channel: Channel, packet: Packet, error: PacketError) -> None:
        """Called for a packet whose external data, size or type is wrong, as ``error`` says.

        The packet has a payload (private, any length) but no external data. Complete it in the
        device's own protocol, or fail it to stop the channel. The default completes with an empty
        payload.
        """
        packet.complete()

    def processing_complete(self, channel: Channel, count: int) -> None:
        """Called when the ring ran empty after ``count`` packets."""

    def suspended(self, channel: Channel) -> None:
        """Called when no packet is delivered any more. What is outstanding should be completed now;
        what is not after a second is taken from the device. Has two seconds, which all channels
        that close at the same time share.
        """

    def machine_stopped(self) -> None:
        """Called when the guest's machine is stopped and every packet has been completed.

        Until :meth:`machine_continued` no packet comes, and what the device sends waits. A device
        that touches guest memory by itself, or an image, a link or a clock that the guest sees,
        leaves that alone from when this returns, in a second at most. Open channels stay open; a
        connection that is lost ends it as well.
        """

    def machine_continued(self) -> None:
        """Called when the machine is about to go on, or is of no concern any more."""

    def unplug_requested(self) -> None:
        """Called when the device is about to be taken from the guest (``device_del``).

        Runs on a thread of its own. Have the guest's driver stop here: once the channels are
        rescinded, Linux takes nothing from their rings any more, and some drivers wait for ever for
        the completion of what they have sent. When this returns, or raises, the front end is asked
        to rescind the device; it does so by itself when the guest has run for 10 seconds, or when
        it is asked a second time. A guest that uses no channel is not waited for, so this may not
        come at all. It may come while channels are opened or closed, and has to return soon after
        they have been closed: the end of the connection waits for it. The device stays on offer to
        the next front end. The default returns at once.
        """

    def closed(self, channel: Channel) -> None:
        """Called when the channel has ended. It may be opened again, as a new :class:`Channel`.

        Every packet of it is completed or dropped (``packet.dropped``). When this returns the guest
        is told that the channel is closed: what the device still does for those packets (writing a
        disk, say) has to have ended, and this may wait for it: two seconds, which all channels that
        close at the same time share. If it does not end, raise
        :exc:`DeviceTimeout`: then the guest is not told, and the connection to the front end ends.
        """

    def stats(self) -> dict[str, Any]:
        """Returns the device's own counters, ready for JSON."""
        return {}
