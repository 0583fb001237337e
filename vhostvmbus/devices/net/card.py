# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic network card: a link behind VMBus channels.

Frames pass in C (:class:`~vhostvmbus.devices.net.datapath.DataPath`). Two kinds of a guest's
packets come up here: those for :class:`~vhostvmbus.devices.net.protocol.Protocol`, on the primary
channel's worker; and malformed RNDIS data, on the worker of the channel that it came on. What comes
from the link is the business of a :class:`~vhostvmbus.devices.net.receiver.Receiver` for each
queue.

Invariants: every packet is completed exactly once; a malformed one costs itself only; a buffer that
the guest revokes is not touched any more when that is completed.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from typing import Any, assert_never
from uuid import UUID

from vhostvmbus.channel import Channel, Packet
from vhostvmbus.channel.stats import RateLimitedLog
from vhostvmbus.device import Device
from vhostvmbus.devices.net import leaving, nvsp, rndis, status, takeover
from vhostvmbus.devices.net.address import address_for
from vhostvmbus.devices.net.buffers import ReceiveBuffer, SendBuffer
from vhostvmbus.devices.net.datapath import MAX_CHANNELS, PATIENCE, DataPath
from vhostvmbus.devices.net.errors import NetError, NvspError, ReturnError, SectionError
from vhostvmbus.devices.net.link import Link
from vhostvmbus.devices.net.nvsp import NO_SECTION, RndisChannel, Status
from vhostvmbus.devices.net.oids import DEFAULT_MTU, Adapter, Change
from vhostvmbus.devices.net.outbox import Outbox
from vhostvmbus.devices.net.protocol import (
    Action,
    Answer,
    Lend,
    OfferSubchannels,
    Outcome,
    Protocol,
    Revoke,
    refused_buffer,
    subchannels_answer,
)
from vhostvmbus.devices.net.receiver import Receivers
from vhostvmbus.devices.net.rss import ReceiveScaling
from vhostvmbus.devices.net.statistics import Counters
from vhostvmbus.wire.errors import (
    ChannelClosed,
    ExternalDataClosed,
    FrontEndError,
    GuestError,
    OfferRefused,
    UsageError,
)

log = logging.getLogger(__name__)

_SENT = nvsp.rndis_packet_complete(Status.SUCCESS)
_INVALID = nvsp.rndis_packet_complete(Status.INVALID_RNDIS_PACKET)


class NetworkCard(Device):
    """One network card with one link."""

    class_id = UUID("f8615163-df3e-46c5-913f-f2d2f965ed0e")
    name = "net"
    max_packet_size = 256  # an NVSP message has 40 bytes; a longer one is answered, not dropped
    max_external_data = (1 << 17) + 4096
    max_external_ranges = 64
    transaction_quota = 1024
    gather_completions = True  # a link never waits
    gather_microseconds = 100  # as network cards moderate their interrupts
    patience = PATIENCE
    """The seconds that frames wait in the link for a guest that gives no receive section back."""

    def __init__(
        self,
        link: Link,
        *,
        mac: bytes | None = None,
        queues: int | None = None,
        instance_id: UUID | None = None,
    ) -> None:
        """Makes a card on ``link``, which it starts, and closes in the end.

        ``mac`` is the station address (default: the link's, else one made from its name);
        ``queues`` the most channels that a guest gets (default: what the link has).
        """
        super().__init__()
        if instance_id is not None:
            self.instance_id = instance_id
        address = mac or link.mac or address_for(link.name)
        if len(address) != 6 or address[0] & 1:
            raise ValueError(f"{address.hex(':')} is no station address")
        self.link = link
        self.max_channels = max(1, min(queues or link.queues, MAX_CHANNELS))
        self.adapter = Adapter(
            address,
            link.mtu,
            link.capabilities,
            ReceiveScaling(self.max_channels),
            self._sum,
        )
        self.protocol = Protocol(self.adapter, max_subchannels=self.max_channels - 1)
        self.tagging = False
        self.errors: Counter[str] = Counter()
        """Mistakes of the guest, by name."""
        self._complaints: defaultdict[str, RateLimitedLog] = defaultdict(
            lambda: RateLimitedLog(log)
        )
        self._lock = threading.RLock()
        self._receivers = Receivers(self.woken, self.name)
        self._outbox = Outbox(self._complain, self._receivers.wake_when_free)
        self._channels = self._outbox.channels
        self._sent: dict[int, Counters] = {}
        self._past = Counters()
        self._path = DataPath()
        self._send: SendBuffer | None = None
        self._lent: dict[bool, int] = {}
        self._subchannels = 0
        self._leaving = False  # being unplugged
        self._own_mtu = self._asked_mtu = link.mtu
        link.start(self._link_changed)
        self.adapter.connected = link.carrier()

    def close(self) -> None:
        """Closes the link. The card must not be serving any more."""
        self._receivers.stop()
        self._path.close()
        self.link.close()

    # -- channels ------------------------------------------------------------------------------

    def opened(self, channel: Channel) -> None:
        """Notes that a channel was opened; with the primary one, a new conversation begins."""
        with self._lock:
            self._path.connect(channel)
            if not channel.index:
                self._begin()
            self._sent[channel.index] = Counters()  # last: what came before may fail
            self._channels[channel.index] = channel

    def _begin(self) -> None:
        self._outbox.forget()  # what has become of the link meanwhile, the guest asks itself
        self.adapter.coalescing = False
        self.adapter.reset()
        self.protocol = Protocol(self.adapter, max_subchannels=self.max_channels - 1)
        self.tagging = False
        self._configure()
        self._use_queues(1)

    def resumed(self, channel: Channel) -> None:
        """Notes that the guest went on while there was no back end; what it had set up is not known
        here.

        Whatever it sends is refused, by the protocol's means, until :meth:`post_started` has the
        guest's driver start anew. That goes for what the back end before had not completed, too:
        the driver waits for it before it gives the card up, and a channel is not closed before
        that.
        """
        self.opened(channel)
        note = None if channel.index else takeover.BufferNote.parse(channel.note)
        if note is not None:
            self.protocol.message_size = note.message_size
            self._configure()

    def post_started(self, channel: Channel) -> None:
        """Rescinds a card that was resumed and offers it again, to be negotiated with anew."""
        if channel.info.resumed and not channel.index:
            log.warning("%s: the guest's driver has to start anew: offered once more", self.name)
            told = self._tell_link_down(channel)
            leaving.wait(self.name, self._outbox, told=told)
            try:
                self.rescind()
                self.offer_again()
            except OfferRefused as error:
                log.error("%s: %s; the guest has to load its driver again", self.name, error)

    def _tell_link_down(self, channel: Channel) -> bool:
        """Has a guest that this back end knows nothing of stop sending.

        Returns whether it could be told.
        """
        found = takeover.find_buffer(channel)
        if found is None:
            return False
        with self._lock:
            note, buffer = found
            self._lent[True] = note.gpadl
            self._outbox.use(buffer)
            self._outbox.answer([rndis.indicate_status(status.MEDIA_DISCONNECT)])
        return True

    def machine_stopped(self) -> None:
        """Leaves the guest's buffer alone, and frames in the link."""
        with self._lock:
            self._outbox.hold(True)
            self._configure()

    def machine_continued(self) -> None:
        """Goes on where it was; what waited is sent by the receivers."""
        with self._lock:
            self._outbox.hold(False)
            self._configure()
            self._receivers.wake()

    def unplug_requested(self) -> None:
        """Waits until the guest's driver sends nothing any more, if it takes a hint."""
        with self._lock:
            self._leaving = leaving.has_driver(self.protocol, self._outbox)
            if self._leaving:
                self._configure()
                self._outbox.answer(self.protocol.link_changed(False))
        if self._leaving:
            leaving.wait(self.name, self._outbox, told=True)

    def started(self, channel: Channel) -> None:
        """Uses all subchannels, both ways, once all that were asked for are open."""
        with self._lock:
            if channel.index and self._subchannels and len(self._channels) > self._subchannels:
                self._subchannels = 0
                self._use_queues(len(self._channels))
                self._outbox.send_table()

    def closed(self, channel: Channel) -> None:
        """Forgets the channel; with the primary one, also what the guest lent and set."""
        with self._lock:
            self._channels.pop(channel.index, None)
            self._past.add(self._sent.pop(channel.index, Counters()))
            self._take_news(channel)
            self._past.add(self._path.sent(channel.index))
            if channel.index:
                return
        self._receivers.stop()
        with self._lock:
            for receive in list(self._lent):
                self._give_back(channel, receive)
            self._outbox.forget()
            self._subchannels = 0
            self._leaving = False
            self.adapter.connected = self.link.carrier()
            self.adapter.reset()
            self._configure()

    def _configure(self) -> None:
        """Gives the data path the settings in force, the newest of them last, whoever calls."""
        with self._lock:
            self._outbox.message_size = self.protocol.message_size
            self._outbox.singly = self.protocol.singly
            self._path.configure(
                self.adapter,
                tagging=self.tagging,
                active=self.protocol.version is not None,
                receiving=self._outbox.buffer is not None and not self._leaving,
                message_size=self.protocol.message_size,
                singly=self.protocol.singly,
                patience=self.patience,
                held=self._outbox.held,
            )

    def woken(self) -> None:
        """Sends answers that waited for a section, if the guest knows which buffer is in use."""
        if self.protocol.ready:
            self._outbox.go_on()

    def _take_news(self, channel: Channel) -> None:
        """Counts what the data path did on a channel."""
        news = self._path.take_news(channel.index)
        channel.count_sent(news.packets, news.payload_bytes, news.signals)
        for _ in range(news.bad_returns):
            self._complain(channel, ReturnError("msg_type", 0, 0, "no receive completion"))

    def _use_queues(self, channels: int) -> None:
        """Receives from as many queues of the link as there are channels."""
        count = min(channels, self.link.queues)
        self._ask_link(lambda: self.link.use_queues(count))
        self._path.use_ports([self.link.port(queue) for queue in range(count)])
        self._receivers.use(self._path, self._outbox, count)

    def _ask_link(self, what: Callable[[], None]) -> None:
        """Has the link change something; a link that is gone just now goes on as it was."""
        try:
            what()
        except OSError as error:
            log.warning("%s: %s", self.link.name, error)

    def _follow_mtu(self) -> None:
        """Gives the host side the guest's MTU if that is larger than the host's own choice, and
        than what every driver begins with; the host's choice otherwise.
        """
        wanted = self.adapter.guest_mtu
        if wanted <= max(self._own_mtu, DEFAULT_MTU):
            wanted = self._own_mtu
        if wanted != self.link.mtu:
            self._asked_mtu = wanted  # before: the link may tell of the change at once
            self._ask_link(lambda: self.link.set_mtu(wanted))
            self._asked_mtu = self.adapter.mtu = self.link.mtu

    def _link_changed(self) -> None:
        """Acts on a change of the link's carrier, MTU or descriptor; any thread."""
        with self._lock:
            self._receivers.wake()
            if self.link.mtu not in (self.adapter.mtu, self._asked_mtu):
                self._own_mtu = self.link.mtu  # set by somebody on the host
            self.adapter.mtu = self.link.mtu
            self._configure()
            up = self.link.carrier() and not self._leaving
            self._outbox.answer(self.protocol.link_changed(up))

    # -- packets of the guest ------------------------------------------------------------------

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Takes one packet and completes it."""
        payload = packet.payload
        try:
            if payload[:4] == nvsp.RNDIS_PACKET and self.protocol.version is not None:
                self._complete(packet, self._messages(channel, packet, payload))
            else:
                action = self.protocol.receive(payload, primary=not channel.index)
                self._negotiate(channel, packet, action)
        except GuestError as error:
            # Pages that vanished, above all: the packet is lost, the channel is not.
            self._complain(channel, error)
            self._complete(packet, _INVALID)

    def packet_rejected(self, channel: Channel, packet: Packet, error: GuestError) -> None:
        """Counts the mistake, malformed or too long external data, and completes the packet."""
        self._complain(channel, error)
        self._complete(packet, _INVALID if packet.payload[:4] == nvsp.RNDIS_PACKET else b"")

    def _complete(self, packet: Packet, message: bytes = b"") -> None:
        """Completes a packet with an NVSP message, as long as the guest's version has it."""
        packet.complete(message[: self.protocol.message_size])

    def _complain(self, channel: Channel, error: GuestError) -> None:
        kind = type(error).__name__
        self.errors[kind] += 1
        # Each kind has its own brake: a frequent mistake does not hide another one.
        self._complaints[kind].warning("%s channel %d: %s", self.name, channel.index, error)

    def _messages(self, channel: Channel, packet: Packet, payload: bytes) -> bytes:
        """Sends or answers the RNDIS messages of a packet. Returns what completes it."""
        counters = self._sent[channel.index]
        try:
            where = nvsp.decode_rndis_packet(payload)
            section = b""
            if where.section != NO_SECTION:
                if self._send is None:
                    raise SectionError("send_buf_section_index", where.section, 8, "no send buffer")
                section = self._send.read(where.section, where.size)
            if packet.external_data is not None:
                section += packet.external_data.read()
            if where.channel == RndisChannel.DATA:
                self._path.send(channel.index, section)
            elif where.channel == RndisChannel.CONTROL and not channel.index:
                self._control(channel, section[: rndis.MAX_CONTROL_SIZE])
            else:
                raise NvspError("channel_type", where.channel, 4)
        except NetError as error:
            counters.send_errors += 1
            self._complain(channel, error)
            return _INVALID
        except ExternalDataClosed as error:
            counters.send_errors += 1
            self._complain(channel, SectionError("gpadl_handle", 0, 4, str(error)))
            return _INVALID
        return _SENT

    def _negotiate(self, channel: Channel, packet: Packet, action: Action) -> None:
        match action:
            case Answer(payload, error):
                if error is not None:
                    self._complain(channel, error)
                self.tagging = self.protocol.tagging
                self._follow_mtu()
                self._configure()
                self._complete(packet, payload)
            case Lend(receive, gpadl, buffer_id):
                self._complete(packet, self._lend(channel, receive, gpadl, buffer_id))
            case Revoke(receive):
                self._give_back(channel, receive)
                self._complete(packet)
            case OfferSubchannels(count):
                self._complete(packet, subchannels_answer(self._offer(channel, count)))
            case _:
                assert_never(action)

    def _offer(self, channel: Channel, count: int) -> int:
        """Has subchannels offered. Returns how many were."""
        if self._subchannels or len(self._channels) > 1:
            self._complain(channel, NvspError("num_subchannels", count, 8, "a second time"))
            return 0
        self._subchannels = count
        try:
            self.offer_channels(count)
        except OfferRefused as error:
            log.warning("%s: no subchannels: %s", self.name, error)
            self._subchannels = 0
            return 0
        return count

    def _lend(self, channel: Channel, receive: bool, gpadl: int, buffer_id: int) -> bytes:
        try:
            mapping = channel.map_gpadl(gpadl, read_only=not receive)
        except ChannelClosed:
            return refused_buffer(receive)
        except (FrontEndError, UsageError, GuestError) as error:
            detail = str(error)
            self._complain(channel, SectionError("gpadl_handle", gpadl, 4, detail))
            return refused_buffer(receive)
        self._lent[receive] = gpadl
        try:
            if receive:
                size = self.protocol.section_size
                buffer = ReceiveBuffer(mapping, buffer_id, size, self._path)
                self._path.lend_receive(buffer)
                answer = self.protocol.lent(buffer)
                note = takeover.BufferNote(gpadl, buffer_id, size, self.protocol.message_size)
                channel.note = note.pack()
                self._outbox.use(buffer)
                self._configure()
                return answer
            self._send = SendBuffer(mapping)
            self._path.lend_send(self._send)
            return self.protocol.lent(self._send)
        except GuestError as error:
            self._complain(channel, error)
        except ExternalDataClosed as error:  # torn down at this moment
            self._complain(channel, SectionError("gpadl_handle", gpadl, 4, str(error)))
        self._give_back(channel, receive)
        return refused_buffer(receive)

    def _give_back(self, channel: Channel, receive: bool) -> None:
        """Stops the use of a buffer."""
        if receive:
            with suppress(ChannelClosed):
                channel.note = b""
            self._outbox.use(None)
        else:
            self._send = None
        self._path.take_back(receive)
        gpadl = self._lent.pop(receive, None)
        if gpadl is not None:
            # The guest may have torn it down already.
            with suppress(FrontEndError, UsageError):
                channel.unmap_gpadl(gpadl)

    # -- RNDIS control -------------------------------------------------------------------------

    def _control(self, channel: Channel, data: bytes) -> None:
        with self._lock:
            outcome = self.protocol.control(data, self.max_external_data)
            self._apply(outcome)
            self._configure()
            self._outbox.answer(outcome.messages)
        if outcome.error is not None:
            self._complain(channel, outcome.error)

    def _apply(self, outcome: Outcome) -> None:
        if outcome.reset or Change.OFFLOADS in outcome.change:
            given = self.adapter.offloads.receive.within(self.adapter.able)
            self._ask_link(lambda: self.link.use_receive_offloads(given))

    # -- counters ------------------------------------------------------------------------------

    def _sum(self) -> Counters:
        """Returns all counters since the card was made, about: threads count without a lock."""
        total = Counters()
        with self._lock:
            for counters in (self._past, *self._sent.values(), self._path.received()):
                total.add(counters)
            for channel in self._channels.values():
                self._take_news(channel)
            for index in self._sent:
                total.add(self._path.sent(index))
        total.receive_no_buffer += self._outbox.lost
        total.control_dropped = self._outbox.dropped
        return total

    def stats(self) -> dict[str, Any]:
        """Returns the link, the negotiation, frames and bytes, and the guest's mistakes by name."""
        protocol, buffer = self.protocol, self._outbox.buffer
        return {
            "link": {"name": self.link.name, **self.link.stats()},
            "address": self.adapter.current_address.hex(":"),
            "connected": self.adapter.connected,
            "mtu": self.adapter.mtu,
            "version": str(protocol.version) if protocol.version else None,
            "packet_filter": self.adapter.packet_filter,
            "channels": len(self._channels),
            "receive_sections": buffer.count if buffer else 0,
            "receive_sections_free": buffer.free if buffer else 0,
            **self._sum().as_dict(),
            "errors": dict(self.errors),
        }
