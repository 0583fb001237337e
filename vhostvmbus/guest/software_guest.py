# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest and its hypervisor in software: the opposite endpoint of a device, without a VM.

Speaks the front end's side of ``docs/vhost-user-vmbus.md`` over a real socket, with real shared
memory and real eventfds.  :meth:`SoftwareGuest.for_device` runs a device behind such a socket
and gives the guest that is connected to it::

    with SoftwareGuest.for_device(Echo()) as guest, guest.open_channel() as channel:
        assert channel.send(b"8 bytes!") == b"8 bytes!"

:meth:`SoftwareGuest.direct` leaves the socket out: the same messages, as calls.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from vhostvmbus.device import Device, DeviceHost
from vhostvmbus.guest.channel import GuestChannel
from vhostvmbus.guest.code_map import GuestCodeMap
from vhostvmbus.guest.direct import DirectFrontEnd
from vhostvmbus.guest.errors import GuestSideError, NoSuchDevice
from vhostvmbus.guest.front_end import ANSWER_TIMEOUT, FrontEnd
from vhostvmbus.guest.gpadl import GuestGpadl, pages_of
from vhostvmbus.guest.inflight import KeptInflight
from vhostvmbus.guest.offers import GuestOffers
from vhostvmbus.guest.ram import GuestRam, RamRegion
from vhostvmbus.guest.serving import connect_socket, serving
from vhostvmbus.guest.transport import Transport
from vhostvmbus.ring import Ring, Role, signal
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backchannel import ANSWER_TIMEOUT as INVALIDATE_TIMEOUT
from vhostvmbus.vhost_user.errors import Disconnected, OfferChanged, RequestRefused
from vhostvmbus.vhost_user.gpadl import write_list
from vhostvmbus.vhost_user.messages import ProtocolFeature
from vhostvmbus.vhost_user.server import Server
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.vmbus import vmbus_version

VERSION = vmbus_version(5, 3)
"""The version that a guest of VMBus 5.3 puts into its opening."""
UNPLUG_TIMEOUT = 10.0
"""Seconds that a back end has to bring the guest's driver to rest."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """The values that open a channel again after a reconnection."""

    opening: Opening
    kick_fd: int
    call_fd: int


class SoftwareGuest:
    """A guest connected to one device: by ``peer``, a socket, or with its host in this process.

    ``ram`` is the guest's memory (default: two regions of 32 MiB with a hole between them).
    ``code_map`` True: the front end negotiates the code map; False: it does not; "unknown": it
    does, but cannot tell which pages are translated.  ``on_invalidate`` is called with the ranges
    of each ``INVALIDATE_CODE``, in another thread, before it is answered.
    ``ram_in_table`` sends ``SET_MEM_TABLE`` instead of one ``ADD_MEM_REG`` for each region.
    ``takes_offers`` False: a front end that has no offers but those of the start.
    ``inflight`` False: one that keeps no in-flight region.
    ``timeout``: seconds that a back end behind a socket has for an answer.
    """

    def __init__(
        self,
        peer: socket.socket | DeviceHost,
        *,
        ram: GuestRam | None = None,
        code_map: bool | str = False,
        on_invalidate: Callable[[Sequence[tuple[int, int]]], None] | None = None,
        ram_in_table: bool = False,
        takes_offers: bool = True,
        inflight: bool = True,
        timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self.ram = ram or GuestRam()
        self._owns_ram = ram is None
        self.code_map: GuestCodeMap | None = None
        self.invalidations: list[tuple[tuple[int, int], ...]] = []
        """Ranges of each ``INVALIDATE_CODE``, in the order in which they came."""
        self.channel_offers: list[m.Message] = []
        """Each ``OFFER_CHANNEL`` and ``RESCIND_CHANNEL``, in the order in which they came."""
        self._offers = GuestOffers(self._take_back)
        self._takes_offers = takes_offers
        self.gpadls: dict[int, GuestGpadl] = {}
        self.channels: dict[int, GuestChannel] = {}
        self.offer: Offer | None = None
        self.server: Server | None = None
        """The server, where :meth:`for_device` runs one."""
        self.host: DeviceHost | None = None
        self._openings: dict[int, _Opened] = {}
        self._inflight = KeptInflight() if inflight else None
        self._gpadl_ids = itertools.count(0xE1E10)
        self._want_code_map = code_map
        self._on_invalidate = on_invalidate
        self._ram_in_table = ram_in_table
        # Channels are opened and closed by the guest, and closed when the host takes them back.
        self._channels_lock = threading.RLock()
        self._timeout = timeout
        self._front_end: Transport | None = None
        try:
            self._connect(peer)
        except BaseException:
            self.close()
            raise

    @classmethod
    def connect(
        cls,
        path: str | os.PathLike[str],
        *,
        class_id: UUID | None = None,
        instance_id: UUID | None = None,
        **options: object,
    ) -> SoftwareGuest:
        """Connects a guest to the back end that listens at ``path``; options as for the class.

        Given ``class_id``, and ``instance_id`` (None: any of that class), the device has to be that
        one (``VmbClientChannelInitSetTargetPnp``): else :class:`NoSuchDevice`.
        """
        guest = cls(connect_socket(path), **options)  # type: ignore[arg-type]
        offer = guest.offer
        assert offer is not None
        for wanted, offered in ((class_id, offer.class_id), (instance_id, offer.instance_id)):
            if wanted is not None and wanted != offered:
                guest.close()
                raise NoSuchDevice(f"{offered or UUID(int=0)} is offered at {path}, not {wanted}")
        return guest

    @classmethod
    @contextlib.contextmanager
    def for_device(
        cls,
        device: Device | DeviceHost,
        *,
        invalidate_timeout: float = INVALIDATE_TIMEOUT,
        **options: object,
    ) -> Iterator[SoftwareGuest]:
        """Serves ``device`` in a thread, over a real socket, and connects a guest to it.

        Options are those of the class.  A device given as such is closed in the end, a
        :class:`DeviceHost` stays its owner's.
        """
        with serving(device, invalidate_timeout=invalidate_timeout) as (server, path, host):
            guest = cls.connect(path, **options)  # type: ignore[arg-type]
            guest.server, guest.host = server, host
            try:
                yield guest
            finally:
                guest.close()

    @classmethod
    @contextlib.contextmanager
    def direct(cls, device: Device | DeviceHost, **options: object) -> Iterator[SoftwareGuest]:
        """Connects a guest to ``device`` without a socket; otherwise as :meth:`for_device`.

        Requests are carried out on the thread that makes them, back-end requests on the device's.
        """
        host = device if isinstance(device, DeviceHost) else DeviceHost(device)
        try:
            with cls(host, **options) as guest:  # type: ignore[arg-type]
                guest.host = host
                yield guest
        finally:
            if host is not device:
                host.close()

    # ---- the connection ----

    @property
    def front_end(self) -> Transport:
        """The connection, for requests of one's own."""
        if self._front_end is None:
            raise Disconnected("the guest's front end is not connected")
        return self._front_end

    def _connect(self, peer: socket.socket | DeviceHost) -> None:
        features = m.REQUIRED_FEATURES
        features |= ProtocolFeature.VMBUS_UNPLUG | ProtocolFeature.VMBUS_SUSPEND
        if self._inflight is not None:
            features |= ProtocolFeature.INFLIGHT_SHMFD
        if self._want_code_map:
            features |= ProtocolFeature.VMBUS_CODE_MAP
        self._offers.connecting()
        if isinstance(peer, socket.socket):
            self._front_end = FrontEnd(peer, features, self._serve_back_end, self._timeout)
        else:
            self._front_end = DirectFrontEnd(peer, features, self._serve_back_end)
        offer = self._front_end.negotiate()
        if self.offer is not None and offer != self.offer:
            raise OfferChanged("the back end came back another one", field="offer", value=offer)
        self.offer = offer
        self._offers.limit(offer)
        if self._inflight is not None:
            self._inflight.share(self._front_end, offer.max_channels)
        self._share_ram()
        if ProtocolFeature.VMBUS_CODE_MAP in self._front_end.features:
            self.share_code_map()

    def _share_ram(self) -> None:
        if self._ram_in_table:
            self.set_memory_table(self.ram.regions)
            return
        for region in self.ram.regions:
            self.add_memory(region)

    def set_memory_table(self, regions: Sequence[RamRegion]) -> None:
        """Sends ``SET_MEM_TABLE``."""
        message = m.SetMemTable(tuple(region.message() for region in regions))
        self.front_end.request(message, [region.fd for region in regions])

    def add_memory(self, region: RamRegion) -> None:
        """Sends ``ADD_MEM_REG``."""
        self.front_end.request(m.AddMemReg(region.message()), [region.fd])

    def remove_memory(self, region: RamRegion) -> None:
        """Sends ``REM_MEM_REG``."""
        self.front_end.request(m.RemMemReg(region.message()))

    def share_code_map(self) -> None:
        """Sends ``VMBUS_SET_CODE_MAP`` for the present regions; bits that are set stay."""
        old, self.code_map = (
            self.code_map,
            GuestCodeMap(self.ram.regions, cannot_tell=self._want_code_map == "unknown"),
        )
        if old is not None:
            self.code_map.take_over(old)
            old.close()
        self.front_end.request(self.code_map.message(), [self.code_map.fd])

    def _serve_back_end(self, message: m.Message) -> int:
        match message:
            case m.InvalidateCode(ranges):
                self.invalidations.append(ranges)
                if self._on_invalidate is not None:
                    self._on_invalidate(ranges)
                return NtStatus.SUCCESS
            case m.OfferChannel() | m.RescindChannel():
                self.channel_offers.append(message)
                if self._takes_offers:
                    return self._offers.request(message)
        return NtStatus.NOT_SUPPORTED

    def disconnect(self) -> None:
        """Loses the back end; the guest goes on and its packets wait in the rings.

        What the back end had taken and not completed is done by the next one, out of the in-flight
        region.  Without one it is lost, which the guest cannot know: such a transaction stays in
        flight, and waiting for it times out.
        """
        if self._front_end is not None:
            self._front_end.close()
            self._front_end = None

    def reconnect(self, to: str | os.PathLike[str] | DeviceHost) -> None:
        """Connects to a back end again: GPADLs are repeated, channels opened with ``RESUME``."""
        self.disconnect()
        with self._channels_lock:
            self._connect(connect_socket(to) if isinstance(to, str | os.PathLike) else to)
            for gpadl in self.gpadls.values():
                self._create_gpadl(gpadl)
            for opened in self._openings.values():
                again = replace(opened.opening, resumed=True)
                self._open(again, opened.kick_fd, opened.call_fd)

    def reset(self) -> None:
        """Sends ``VMBUS_RESET``: the guest reboots, or unloads the bus."""
        with self._channels_lock:
            self.front_end.request(m.Reset())
            self._offers.end_subchannels()
            self._forget_channels()
        for gpadl in self.gpadls.values():
            self.ram.free_pages(gpadl.owned_pfns)
        self.gpadls.clear()

    def close(self) -> None:
        """Leaves, and closes everything."""
        self.disconnect()
        self._offers.close()
        self._forget_channels()
        self.gpadls.clear()
        if self._inflight is not None:
            self._inflight.forget()
        if self.code_map is not None:
            self.code_map.close()
            self.code_map = None
        if self._owns_ram:
            self.ram.close()

    def __enter__(self) -> SoftwareGuest:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget_channels(self) -> None:
        for index in list(self.channels):
            self._openings.pop(index, None)
            channel = self.channels.pop(index)
            channel.detach()
            self.ram.free_pages(channel.ring.pfns)

    # ---- GPADLs ----

    def create_gpadl(
        self,
        pages: Sequence[int] | int | Sequence[GpaRange],
        *,
        channel: int = 0,
        gpadl_id: int | None = None,
    ) -> GuestGpadl:
        """Sends ``VMBUS_GPADL_CREATE`` of these PFNs, so many pages allocated for it, or ranges.

        Raises :class:`RequestRefused`.
        """
        ranges, owned = pages_of(self.ram, pages)
        number = next(self._gpadl_ids) if gpadl_id is None else gpadl_id
        gpadl = GuestGpadl(number, channel, ranges, owned)
        try:
            self._create_gpadl(gpadl)
        except BaseException:
            self.ram.free_pages(owned)
            raise
        self.gpadls[number] = gpadl
        return gpadl

    def _create_gpadl(self, gpadl: GuestGpadl) -> None:
        fd, size = write_list(gpadl.ranges)
        try:
            self.front_end.request(
                m.GpadlCreate(gpadl.channel, gpadl.gpadl_id, len(gpadl.ranges), size), [fd]
            )
        finally:
            os.close(fd)

    def delete_gpadl(self, gpadl: GuestGpadl) -> None:
        """Sends ``VMBUS_GPADL_TEARDOWN``; pages allocated for it are free again."""
        self.front_end.request(m.GpadlTeardown(gpadl.channel, gpadl.gpadl_id))
        self.gpadls.pop(gpadl.gpadl_id, None)
        self.ram.free_pages(gpadl.owned_pfns)

    # ---- offers ----

    @property
    def offered(self) -> list[int]:
        """The channels that may be opened, ascending."""
        return self._offers.offered

    def wait_for_offer(self, index: int, timeout: float = ANSWER_TIMEOUT) -> None:
        """Waits until channel ``index`` is offered. Raises :class:`NotOffered`."""
        self._offers.wait(index, timeout)

    def wait_for_rescind(self, index: int, timeout: float = ANSWER_TIMEOUT) -> None:
        """Waits until channel ``index`` is rescinded. Raises ``TimeoutError``."""
        self._offers.wait_gone(index, timeout)

    def unplug(self, patience: float = UNPLUG_TIMEOUT) -> bool:
        """Unplugs the device from the guest, as ``device_del`` does, and ends the connection.

        A back end that wants notice of it gets one. Returns whether it answered within ``patience``
        seconds that its driver is at rest.
        """
        asked = False
        if ProtocolFeature.VMBUS_UNPLUG in self.front_end.features:
            with contextlib.suppress(RequestRefused, TimeoutError):
                self.front_end.request(m.Unplug())
                self._offers.wait_gone(0, patience)
                asked = True
        if not asked:
            self._offers.request(m.RescindChannel(0))
            self._offers.wait_gone(0, ANSWER_TIMEOUT)
        self.disconnect()
        return asked

    def _take_back(self, index: int) -> None:
        """Closes a channel that the host rescinds: nothing of it stays with the back end."""
        with self._channels_lock:
            if index in self.channels:
                self.disable(index)
            for gpadl in [item for item in self.gpadls.values() if item.channel == index]:
                self.delete_gpadl(gpadl)

    # ---- channels ----

    @contextlib.contextmanager
    def open_channel(
        self,
        index: int = 0,
        *,
        ring_pages: tuple[int, int] = (17, 17),
        user_data: bytes = b"",
        target_vp: int = 0,
        version: int = VERSION,
        scattered: bool = True,
    ) -> Iterator[GuestChannel]:
        """Opens a channel with :meth:`enable` for the length of a ``with`` block."""
        channel = self.enable(
            index,
            ring_pages=ring_pages,
            user_data=user_data,
            target_vp=target_vp,
            version=version,
            scattered=scattered,
        )
        try:
            yield channel
        finally:
            with self._channels_lock:
                if self.channels.get(index) is channel:
                    self.disable(index)

    def enable(
        self,
        index: int = 0,
        *,
        ring_pages: tuple[int, int] = (17, 17),
        user_data: bytes = b"",
        target_vp: int = 0,
        version: int = VERSION,
        scattered: bool = True,
    ) -> GuestChannel:
        """Opens a channel.

        ``ring_pages`` are the pages of the out and of the in ring, each with its header page;
        ``user_data`` at most 120 bytes.  Raises :class:`RequestRefused` with the device's status,
        :class:`NotOffered`.
        """
        with self._channels_lock:
            self._offers.require(index)
            if index in self.channels:
                raise GuestSideError(f"channel {index} is open already")
            pfns = self.ram.alloc_pages(sum(ring_pages), scattered=scattered)
            with contextlib.ExitStack() as undo:
                undo.callback(self.ram.free_pages, pfns)
                ring = Ring(self.ram.memory, pfns, ring_pages[0], Role.GUEST, initialize=True)
                undo.callback(ring.close)
                gpadl = self.create_gpadl(pfns, channel=index)
                undo.callback(self._delete_ring_gpadl, gpadl)
                kick, call = (os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2))
                undo.callback(os.close, kick)
                undo.callback(os.close, call)
                opening = Opening(
                    index, gpadl.gpadl_id, ring_pages[0], target_vp, version, user_data
                )
                self._open(opening, kick, call)
                undo.pop_all()
            self._openings[index] = _Opened(opening, kick, call)
            self.channels[index] = GuestChannel(index, ring, kick, call)
            return self.channels[index]

    def _delete_ring_gpadl(self, gpadl: GuestGpadl) -> None:
        with contextlib.suppress(Disconnected):
            self.delete_gpadl(gpadl)

    def _open(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
        self.front_end.request(m.Open(opening), [kick_fd, call_fd])
        # "so that a packet put in the ring early is seen"
        signal(kick_fd)

    def disable(self, index: int = 0) -> None:
        """Closes a channel and frees its ring. Outstanding transactions end with an error.

        With channel 0, subchannels that were offered later go.
        """
        with self._channels_lock:
            self._disable(index)
            for subchannel in self._offers.end_subchannels() if index == 0 else ():
                self._take_back(subchannel)

    def _disable(self, index: int) -> None:
        channel = self.channels.pop(index)
        gpadl = self.gpadls[self._openings.pop(index).opening.gpadl_id]
        front_end = self._front_end  # which another thread may leave just now
        try:
            if front_end is not None:
                front_end.request(m.Close(index))
                front_end.request(m.GpadlTeardown(index, gpadl.gpadl_id))
        finally:
            self.gpadls.pop(gpadl.gpadl_id, None)
            channel.detach()
            self.ram.free_pages([pfn for item in gpadl.ranges for pfn in item.pfns])

    def move_interrupt(self, index: int, target_vp: int) -> None:
        """Sends ``VMBUS_MODIFY``."""
        self.front_end.request(m.Modify(index, target_vp))
