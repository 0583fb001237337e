# SPDX-License-Identifier: GPL-2.0-or-later
"""The card's frames, in C: between the link's ports and the guest's rings.

``native/`` moves them: a plan of the card's own sends what the guest puts into RNDIS packets and
takes receive sections back, on the channels' workers; a thread for each queue of the link puts
frames into sections and sends the guest packets about them. The settings that were negotiated go
there from here. Only two things come up: malformed packets, whose mistake :meth:`DataPath.send`
finds, and frames for which no packet could be sent.

Invariants: a buffer's memory is not touched any more when :meth:`DataPath.take_back` returned, or
when the guest's GPADL is gone; a channel's ring is not touched after the channel is closed, and
sections that the guest had from it are free then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Final, NamedTuple

from vhostvmbus.channel import Channel
from vhostvmbus.devices.net.buffers import ReceiveBuffer, SendBuffer
from vhostvmbus.devices.net.errors import FrameError, NetError, PacketInfoError, RndisError
from vhostvmbus.devices.net.link.port import Port
from vhostvmbus.devices.net.nvsp import MESSAGE_SIZE
from vhostvmbus.devices.net.oids import Adapter
from vhostvmbus.devices.net.statistics import Counters, Direction
from vhostvmbus.engine import ffi, lib
from vhostvmbus.memory.external import SEG_SIZE

if TYPE_CHECKING:
    from vhostvmbus._engine import Pointer, vvb_net, vvb_net_counts, vvb_plan

PATIENCE: Final = 1.0
"""The seconds that frames wait in the link for a guest that has all receive sections and gives none
back: longer than a guest is not scheduled, shorter than a sender takes to give up.
"""
MAX_CHANNELS: Final[int] = lib.VVB_NET_CHANNELS
"""The most channels of a card, and queues of a link."""
_ERRORS: Final[dict[int, type[NetError]]] = {
    lib.VVB_NET_E_RNDIS: RndisError,
    lib.VVB_NET_E_INFO: PacketInfoError,
    lib.VVB_NET_E_FRAME: FrameError,
}


class Part(NamedTuple):
    """A receive section of which the guest has not been told yet."""

    channel: int
    section: int
    byte_count: int
    byte_offset: int


class Served(NamedTuple):
    """The end of one :meth:`DataPath.serve`."""

    woken: bool
    """Set if the eventfd is readable."""
    left: list[Part]
    """The parts that the caller has to hand over; a channel's parts come in a row."""
    lease: int
    """The lease of the buffer that they are in: :attr:`ReceiveBuffer.lease`."""


class News(NamedTuple):
    """A count of what happened on a channel."""

    packets: int
    """How many packets were put into its ring, of ``bytes`` bytes together."""
    payload_bytes: int
    signals: int
    """How often the guest was signalled for them."""
    bad_returns: int
    """How many completions gave sections back and were no receive completions."""


class ChannelPlan:
    """The plan of one channel: see ``vvb_net_plan()``."""

    def __init__(self, path: DataPath, net: Pointer[vvb_net], channel: int) -> None:
        handle = lib.vvb_net_plan(net, channel)
        if handle == ffi.NULL:
            raise MemoryError("the network card's plan")
        self._path = path  # which the plan points into
        self._handle = ffi.gc(handle, lib.vvb_plan_free)

    @property
    def handle(self) -> Pointer[vvb_plan]:
        """The engine's ``struct vvb_plan *``."""
        return self._handle


class DataPath:
    """The data path of one card. Any thread may call it; one at a time takes from a queue."""

    def __init__(self) -> None:
        net = lib.vvb_net_new()
        if net == ffi.NULL:
            raise MemoryError("the network card's data path")
        self._net = ffi.gc(net, lib.vvb_net_free)
        self._ports: list[Port] = []
        self._leases = count(1)
        self._message_size = MESSAGE_SIZE
        self._taken = [ffi.new("struct vvb_net_taken *") for _ in range(MAX_CHANNELS)]

    def close(self) -> None:
        """Gives its descriptor up; nobody takes frames from a queue any more."""
        lib.vvb_net_close(self._net)

    def configure(
        self,
        adapter: Adapter,
        *,
        tagging: bool,
        active: bool,
        receiving: bool,
        message_size: int = MESSAGE_SIZE,
        singly: bool = False,
        patience: float = PATIENCE,
        held: bool = False,
    ) -> None:
        """Puts in force what the guest set.

        The guest may send if ``active``, and gets frames if ``receiving``, each in a packet of its
        own if ``singly``, with NVSP messages of ``message_size`` bytes; these wait in the link for
        ``patience`` seconds while it gives no section back, and, if ``held``, until that ends.
        """
        config = ffi.new("struct vvb_net_config *")
        scaling, in_force = adapter.scaling.current, adapter.offloads
        offloads = adapter.offered  # what the guest has switched off is done all the same
        config.active, config.receiving = active, receiving
        config.message_size = self._message_size = message_size
        config.singly = singly
        config.patience_ms = int(patience * 1000)
        config.held = held
        config.max_frame = adapter.longest
        config.send_offloads = (
            offloads.ip_checksum * lib.VVB_NET_IP_CHECKSUM
            | offloads.tcp4_send * lib.VVB_NET_TCP4
            | offloads.udp4_send * lib.VVB_NET_UDP4
            | offloads.tcp6_send * lib.VVB_NET_TCP6
            | offloads.udp6_send * lib.VVB_NET_UDP6
            | offloads.lso4 * lib.VVB_NET_LARGE4
            | offloads.lso6 * lib.VVB_NET_LARGE6
        )
        config.tell_checksums = in_force.receive.checksum
        config.tagging = tagging
        config.coalesced = in_force.rsc4 or in_force.rsc6
        config.packet_filter = adapter.packet_filter
        multicast = b"".join(adapter.multicast)
        config.multicast_count = len(adapter.multicast)
        ffi.memmove(config.multicast, multicast, len(multicast))
        ffi.memmove(config.addresses, adapter.current_address + adapter.permanent_address, 12)
        if scaling.enabled:
            config.hash_types = scaling.types
            config.table_size = len(scaling.table)
            config.table[0 : len(scaling.table)] = list(scaling.table)
            ffi.memmove(config.key, scaling.key, lib.VVB_NET_KEY)
        lib.vvb_net_configure(self._net, config)

    def use_ports(self, ports: Sequence[Port]) -> None:
        """Takes frames from the link's queues; a channel sends to that of its number modulo."""
        for queue, port in enumerate(ports):
            _check(lib.vvb_net_set_queue(self._net, queue, port.handle))
        _check(lib.vvb_net_use_queues(self._net, len(ports)))
        self._ports += ports[len(self._ports) :]

    # -- buffers -------------------------------------------------------------------------------

    def lend_send(self, buffer: SendBuffer) -> None:
        """Lets packets refer to the sections of this buffer."""
        lease = next(self._leases)

        def use(segs: bytes) -> None:
            number = len(segs) // SEG_SIZE
            _check(lib.vvb_net_lend_send(self._net, segs, number, buffer.section_size, lease))

        buffer.mapping.lend(use, partial(self.take_back, False, lease))

    def lend_receive(self, buffer: ReceiveBuffer) -> None:
        """Puts frames into the sections of this buffer, all but the first few: answers go into
        those.
        """
        lease = buffer.lease = next(self._leases)

        def use(segs: bytes) -> None:
            number, size = len(segs) // SEG_SIZE, buffer.section_size
            _check(
                lib.vvb_net_lend_receive(
                    self._net, segs, number, size, buffer.set_id, buffer.reserve, lease
                )
            )

        buffer.mapping.lend(use, partial(self.take_back, True, lease))

    def take_back(self, receive: bool, lease: int = 0) -> None:
        """Stops the use of a buffer; with a ``lease``, only of the one that has it."""
        if receive:
            lib.vvb_net_lend_receive(self._net, ffi.NULL, 0, 0, 0, 0, lease)
        else:
            lib.vvb_net_lend_send(self._net, ffi.NULL, 0, 0, lease)

    @property
    def free_sections(self) -> int:
        """The number of sections for frames that the guest does not have."""
        return int(lib.vvb_net_free_sections(self._net))

    def section(self, lease: int) -> int | None:
        """Returns a free section for the caller; ``None`` if none is free, or no such buffer."""
        section = int(lib.vvb_net_section(self._net, lease))
        return section if section >= 0 else None

    def give(self, lease: int, section: int) -> None:
        """Gives back a section that the caller had, if there still is the buffer."""
        lib.vvb_net_give(self._net, lease, section)

    # -- channels ------------------------------------------------------------------------------

    def connect(self, channel: Channel) -> None:
        """Lets frames pass from now on, both ways, until the channel closes."""
        index = channel.index
        ring, call_fd = channel.lend_ring(partial(lib.vvb_net_disconnect, self._net, index))
        _check(lib.vvb_net_connect(self._net, channel.index, ring, call_fd))
        channel.set_plan(ChannelPlan(self, self._net, channel.index))

    def sent(self, index: int) -> Counters:
        """Returns what was sent on a channel since it was connected; mistakes are not counted
        there.
        """
        counts = lib.vvb_net_sent(self._net, index)
        counters = Counters(send_refused=counts.refused, large_sends=counts.large)
        _fill(counters.sent, counts)
        return counters

    def take_news(self, index: int) -> News:
        """Returns what happened on a channel since the last call."""
        news = ffi.new("struct vvb_net_news *")
        lib.vvb_net_take_news(self._net, index, news)
        size = news.told * self._message_size
        return News(news.told, size, news.signals, news.bad_returns)

    def received(self) -> Counters:
        """Returns what was received, on all queues."""
        total = Counters()
        for queue in range(len(self._ports)):
            counts = lib.vvb_net_received(self._net, queue)
            counters = Counters(
                receive_filtered=counts.filtered,
                receive_no_buffer=counts.refused,
                receive_errors=counts.errors,
                coalesced=counts.large,
            )
            _fill(counters.received, counts)
            total.add(counters)
        return total

    # -- frames --------------------------------------------------------------------------------

    def send(self, channel: int, data: bytes) -> None:
        """Sends the frames in the RNDIS messages of a packet that came up.

        Those in front of a malformed message are sent, those behind it are not. Raises the
        :class:`NetError` that says what is wrong with it.
        """
        fault = ffi.new("struct vvb_net_fault *")
        lib.vvb_net_send(self._net, channel, ffi.from_buffer(bytearray(data)), len(data), fault)
        if fault.error:
            field, detail = (ffi.string(text).decode() for text in (fault.field, fault.detail))
            raise _ERRORS[fault.error](field, fault.value, fault.offset, detail)

    def serve(self, queue: int, wake_fd: int) -> Served:
        """Takes frames from a queue of the link and tells the guest of them, and waits for more.

        Returns when ``wake_fd`` is readable, or there is something that only the caller can do.
        Frames that the guest cannot get are dropped: see ``vvb_net_serve()``.
        """
        taken = self._taken[queue]
        lib.vvb_net_serve(self._net, queue, wake_fd, taken)
        left = [
            Part(part.channel, part.section, part.byte_count, part.byte_offset)
            for part in (taken.parts[i] for i in range(taken.left))
        ]
        return Served(bool(taken.woken), left, taken.lease)

    def wake_when_free(self, wake_fd: int) -> None:
        """Signals that eventfd once when the guest next gives sections back."""
        lib.vvb_net_wake_when_free(self._net, wake_fd)


def _fill(direction: Direction, counts: vvb_net_counts) -> None:
    for name in direction.__slots__:
        setattr(direction, name, getattr(counts, name))


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
