# SPDX-License-Identifier: GPL-2.0-or-later
"""Drives one device: its memory, GPADLs and channels, as the front end's requests ask for.

Each method is one request of docs/vhost-user-vmbus.md; there is no socket in here. Methods are
called by one thread at a time (the server's); :meth:`DeviceHost.stats` by any. Invariants: a
request that is answered is done; a refused one changed nothing; one channel's failure leaves the
others.
"""

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vhostvmbus.channel import Channel, ChannelStats, GpadlTable, Packet
from vhostvmbus.device.device import Device
from vhostvmbus.device.loop import DeviceLoop
from vhostvmbus.device.offers import ChannelOffers
from vhostvmbus.device.unplug import Unplugging
from vhostvmbus.memory import CodeMap, GuestMemory, Region, wait_until_unused
from vhostvmbus.ring import InflightRegion, PacketLimits, Ring
from vhostvmbus.wire.errors import (
    ChannelStateError,
    ChannelUnknown,
    FrontEndError,
    GuestError,
    InflightInvalid,
    OfferRefused,
    PacketError,
    RefuseOpen,
    RegionBusy,
)
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import SharedRegion
from vhostvmbus.wire.vmbus import CHANNEL_FLAGS_MASK, PAGE_SIZE

log = logging.getLogger(__name__)

Invalidate = Callable[[list[tuple[int, int]]], None]
PATIENCE = 4.0
"""The seconds that packets get to complete when the memory of their external data is removed."""
LAST_PATIENCE = 3.0
"""The seconds after that, when the memory has been taken from them; the front end waits for 10 in
all.
"""


class DeviceHost:
    """The owner of a device's memory, GPADLs and channels.

    ``channel_failed`` (optional) is called for each channel that stopped because of the guest.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.name = device.name or type(device).__name__
        self.memory = GuestMemory()
        self.gpadls = GpadlTable(self.memory)
        self.channel_failed: Callable[[int, GuestError], None] | None = None
        self._offer = self._make_offer(device)
        self.offers = ChannelOffers(device.channels, device.max_channels)
        device.serve_with(self.offers)
        self._unplugging = Unplugging(self.name, device.unplug_requested, self.offers.let_go)
        self._channels: dict[int, Channel] = {}
        self._inflight: InflightRegion | None = None
        self._inflight_errors = 0
        self._handler = _Handler(self)
        self._lock = threading.RLock()
        self._stats_lock = threading.Lock()  # a closing channel is counted once
        self._past = ChannelStats()

    @staticmethod
    def _make_offer(device: Device) -> Offer:
        for name in (
            "transaction_quota",
            "max_packet_size",
            "max_external_data",
            "max_external_ranges",
        ):
            if getattr(device, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        # A front end may meet flags that are newer than itself; a device's author has none of them.
        unknown = device.channel_flags & ~CHANNEL_FLAGS_MASK
        if unknown:
            raise ValueError(f"channel_flags has unknown bits {unknown:#x}")
        return Offer(
            device.class_id,
            device.instance_id,
            device.channel_flags,
            device.mmio_megabytes,
            device.channels,
            device.max_channels,
            device.user_defined,
        )

    def offer(self) -> Offer:
        """Returns what the device offers; the same for as long as this object lives."""
        return self._offer

    @property
    def channels(self) -> dict[int, Channel]:
        """The open channels by index: a copy."""
        return dict(self._channels)

    @property
    def invalidate(self) -> Invalidate | None:
        """The server's way to have translations of ``(gpa, size)`` ranges discarded.

        It returns when the front end has acknowledged that: step 3 of *Translated code*.
        """
        return self.memory.written.discard

    @invalidate.setter
    def invalidate(self, invalidate: Invalidate | None) -> None:
        self.memory.written.discard = invalidate

    def connected(self) -> None:
        """Notes that a front end can be asked for something from now on."""
        try:
            self.offers.connected()
        except OfferRefused as error:
            log.error("%s: the front end offers what is taken back: %s", self.name, error)

    # -- memory --------------------------------------------------------------------------------

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> Region:
        """Maps a region of guest memory, for ADD_MEM_REG; ``fd`` is duplicated.

        Raises what :meth:`GuestMemory.add_region` raises.
        """
        return self.memory.add_region(guest_phys_addr, size, fd, mmap_offset)

    def remove_region(self, guest_phys_addr: int, size: int) -> None:
        """Unmaps a region, for REM_MEM_REG. Returns when nothing refers to it any more.

        GPADL mappings in it end; packets get :data:`PATIENCE` to complete before their external
        data is taken from the device; channels whose ring lies in it are closed. Raises
        :exc:`RegionBusy` if that was not enough; the region and the channels stay then.
        """
        with self._lock:
            self.memory.remove_region(guest_phys_addr, size, self._release)
            self._close_rings_in(guest_phys_addr, size)

    def set_memory_table(self, table: Sequence[SharedRegion]) -> None:
        """Applies SET_MEM_TABLE: all of ``table``, or what there was. The caller keeps the
        descriptors.

        What is in both stays mapped; what goes is given up as :meth:`remove_region` does it.
        """
        with self._lock:
            for region in self.memory.set_table(table, self._release):
                self._close_rings_in(region.guest_phys_addr, region.size)

    def _release(self, regions: Sequence[Region]) -> None:
        """Ends all uses of memory that goes. Raises :exc:`RegionBusy`."""
        for gpadl in self.gpadls:
            if gpadl.mapping is not None and any(
                gpadl.touches(region.guest_phys_addr, region.size) for region in regions
            ):
                gpadl.mapping.close(wait=True)
        try:
            wait_until_unused(regions, PATIENCE)
        except RegionBusy:
            for region in regions:
                for channel in self._channels.values():
                    channel.drop_packets_in(region.guest_phys_addr, region.size)
            wait_until_unused(regions, LAST_PATIENCE)

    def _close_rings_in(self, guest_phys_addr: int, size: int) -> None:
        """Closes the channels whose ring lies in memory that has gone."""
        for index, channel in list(self._channels.items()):
            gpadl = channel.ring_gpadl
            if gpadl is not None and gpadl.touches(guest_phys_addr, size):
                log.warning("%s: its ring's memory is removed", channel.name)
                self.close_channel(index)

    def set_code_map(
        self, fd: int, map_bytes: int, regions: Sequence[tuple[int, int, int]]
    ) -> None:
        """Maps the code map, for VMBUS_SET_CODE_MAP. The caller keeps ``fd``.

        ``regions`` are ``(gpa, size, first_bit)``.
        """
        self.memory.written.use_code_map(CodeMap(fd, map_bytes, regions))

    # -- packets in flight ---------------------------------------------------------------------

    def make_inflight(self, channels: int) -> InflightRegion:
        """Makes an empty region for ``channels`` channels, as far as there may be, for
        GET_INFLIGHT_FD.

        The region stays this object's. Raises :exc:`ChannelStateError` while a channel is open.
        """
        channels = max(1, min(channels, self._offer.max_channels))
        quota, limits = self._handler.transaction_quota, self._handler.limits
        region = InflightRegion.create(channels, quota, limits)
        self._use_inflight(region)
        return region

    def adopt_inflight(self, fd: int, size: int, offset: int, channels: int, slots: int) -> None:
        """Takes over the region of the back end before this one, for SET_INFLIGHT_FD.

        The caller keeps ``fd``. Raises :exc:`InflightInvalid`, or :exc:`ChannelStateError` while a
        channel is open.
        """
        self._use_inflight(InflightRegion.adopt(fd, size, offset, channels, slots))

    def _use_inflight(self, region: InflightRegion | None) -> None:
        if self._channels and region is not None:
            region.close()
            raise ChannelStateError("a channel is open")
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = region

    def _record(self, opening: Opening, ring: Ring) -> None:
        """Has the ring record its packets; what is broken is reported, and an empty part used."""
        if self._inflight is None:
            return
        for resume in (True, False) if opening.resumed else (False,):
            try:
                self._inflight.record(opening.index, ring, resume=resume)
                break
            except InflightInvalid as error:
                self._inflight_errors += 1
                log.error("%s/%d: %s", self.name, opening.index, error)
        if ring.to_replay:
            log.info("%s/%d: %d packets once more", self.name, opening.index, ring.to_replay)

    def _forget_inflight(self, index: int | None = None) -> None:
        if self._inflight is not None:
            try:
                self._inflight.clear(index)
            except InflightInvalid as error:
                self._inflight_errors += 1
                log.error("%s: %s", self.name, error)

    # -- GPADLs --------------------------------------------------------------------------------

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self._offer.max_channels:
            raise ChannelUnknown(f"no channel {index}")

    def gpadl_create(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> None:
        """Makes a GPADL, for VMBUS_GPADL_CREATE.

        Raises :exc:`ChannelUnknown`, and what :meth:`GpadlTable.create` raises.
        """
        self._check_index(channel)
        self.gpadls.create(channel, gpadl_id, ranges)

    def gpadl_teardown(self, channel: int, gpadl_id: int) -> None:
        """Tears a GPADL down, for VMBUS_GPADL_TEARDOWN, and before that closes the channel whose
        ring it is.
        """
        with self._lock:
            gpadl = self.gpadls.get(gpadl_id)
            for index, opened in list(self._channels.items()):
                if opened.ring_gpadl is gpadl:
                    self.close_channel(index)
            self.gpadls.remove(gpadl_id)

    # -- channels ------------------------------------------------------------------------------

    def open_channel(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
        """Opens a channel, for VMBUS_OPEN; both eventfds are duplicated.

        Raises :exc:`FrontEndError`, or :exc:`RefuseOpen` if the device refuses or fails.
        """
        with self._lock:
            try:
                self._open(opening, kick_fd, call_fd)
            except (FrontEndError, RefuseOpen):
                raise
            except Exception as error:
                log.exception("%s/%d: open failed", self.name, opening.index)
                raise RefuseOpen(message=f"{type(error).__name__} in the device") from error

    def _open(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
        index = opening.index
        self._check_index(index)
        if index in self._channels:
            raise ChannelStateError(f"channel {index} is open already")
        gpadl = self.gpadls.get(opening.gpadl_id)
        if gpadl.channel != index:
            raise FrontEndError(f"GPADL {opening.gpadl_id:#x} belongs to channel {gpadl.channel}")
        ring = Ring(
            self.memory, gpadl.ring_pfns(), opening.ring_offset, limits=self._handler.limits
        )
        try:
            self._record(opening, ring)
            channel = Channel(self._handler, opening, ring, kick_fd, call_fd, self.gpadls)
        except BaseException:
            ring.close()
            raise
        channel.ring_gpadl = gpadl
        try:
            if opening.resumed:
                self.device.resumed(channel)
            else:
                self.device.opened(channel)
            # Known before it runs: what started() does may come back here at once.
            self._channels[index] = channel
            self.device.started(channel)
        except BaseException:
            self._channels.pop(index, None)
            channel.close(grace=0)
            raise
        self.offers.opened(index)
        channel.begin()
        if type(self.device).post_started is not Device.post_started:
            channel.run_beside(lambda: self.device.post_started(channel))

    def close_channel(self, index: int) -> None:
        """Closes a channel, for VMBUS_CLOSE.

        Returns when neither ring nor external data is touched any more.
        """
        self._close(index, publish=False)

    def _close(self, index: int, publish: bool) -> None:
        with self._lock:
            self._check_index(index)
            channel = self._channels.get(index)
            if channel is None:
                raise ChannelStateError(f"channel {index} is not open")
            channel.close(lambda: self._handler.suspended(channel), publish=publish)
            if not publish:
                self._forget_inflight(index)
            with self._stats_lock:
                self._past.add(channel.stats)
                del self._channels[index]
            if index == 0:
                self.offers.forget()
            self._handler.closed(channel)

    def modify_channel(self, index: int, target_vp: int) -> None:
        """Logs which virtual processor gets the channel's interrupt, for VMBUS_MODIFY."""
        self._check_index(index)
        channel = self._channels.get(index)
        if channel is None:
            raise ChannelStateError(f"channel {index} is not open")
        channel.target_vp = target_vp

    def reset(self) -> None:
        """Closes every channel, subchannels first, and forgets every GPADL, for VMBUS_RESET."""
        self._reset(publish=False)
        self._forget_inflight()

    def _reset(self, publish: bool) -> None:
        with self._lock:
            for index in sorted(self._channels, reverse=True):
                self._close(index, publish)
            self.offers.forget()
            self.gpadls.clear()

    def unplug(self) -> None:
        """Begins to unplug the device, for VMBUS_UNPLUG: the rescind follows when the device is
        ready.
        """
        self._unplugging.begin()

    def disconnect(self) -> None:
        """Forgets all that came from the front end, which has gone, or which this end is about to
        leave.

        The device lives on. The guest may have its channels open still and wait for the next back
        end, so what was taken from the rings is answered as far as that takes no longer than a
        second.
        """
        with self._lock:
            self._reset(publish=True)
            self._unplugging.end()
            self._use_inflight(None)
            self.memory.written.use_code_map(None)
            self.memory.close()

    def close(self) -> None:
        """Ends everything."""
        self.disconnect()
        self._handler.close()

    # -- translated code, statistics -----------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Returns the counters of the device and its open channels, ready for JSON:
        docs/statistics.md.
        """
        regions = self.memory.regions
        totals = ChannelStats()
        with self._stats_lock:
            open_channels = [self._channels[index] for index in sorted(self._channels)]
            channels = [channel.as_dict() for channel in open_channels]
            for stats in (self._past, *(channel.stats for channel in open_channels)):
                totals.add(stats)
        return {
            "name": self.name,
            "class_id": str(self._offer.class_id),
            "memory_regions": len(regions),
            "memory_bytes": sum(region.size for region in regions),
            "gpadls": len(self.gpadls),
            "gpadl_bytes": self.gpadls.pages * PAGE_SIZE,
            "code_map": self.memory.written.watched,
            "inflight_slots": self._inflight.slots if self._inflight else 0,
            "inflight_errors": self._inflight_errors,
            "totals": totals.as_dict(),
            "channels": channels,
            "device": self.device.stats(),
        }


class _Handler:
    """The way of a channel's events to the device: the only place that knows both."""

    def __init__(self, host: DeviceHost) -> None:
        device = host.device
        self._host = host
        self._device = device
        self._loop: DeviceLoop | None = None
        self._loop_lock = threading.Lock()
        self._async = inspect.iscoroutinefunction(device.packet_received)
        self.name = host.name
        self.limits = PacketLimits(
            device.max_packet_size, device.max_external_data, device.max_external_ranges
        )
        self.transaction_quota = device.transaction_quota
        self.gather_completions = device.gather_completions
        self.gather_microseconds = device.gather_microseconds
        self.written = host.memory.written
        if not self._async:
            # Saves a call on the way of every packet.
            self.packet_received = device.packet_received  # type: ignore[method-assign,assignment]

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        coroutine = self._device.packet_received(channel, packet)
        if coroutine is None:
            return
        with self._loop_lock:
            if self._loop is None:
                self._loop = DeviceLoop(f"{self.name} loop")

        def failed(error: BaseException) -> None:
            channel.packet_raised(packet, error)

        self._loop.submit(channel, coroutine, failed)

    def packet_rejected(self, channel: Channel, packet: Packet, error: PacketError) -> None:
        self._device.packet_rejected(channel, packet, error)

    def processing_complete(self, channel: Channel, count: int) -> None:
        self._device.processing_complete(channel, count)

    @property
    def wants_processing_complete(self) -> bool:
        return type(self._device).processing_complete is not Device.processing_complete

    def channel_failed(self, channel: Channel, error: GuestError) -> None:
        if self._host.channel_failed is not None:
            self._host.channel_failed(channel.index, error)

    def suspended(self, channel: Channel) -> None:
        try:
            self._device.suspended(channel)
        except Exception:
            log.exception("%s: suspended() failed", channel.name)
        if self._loop is not None:
            self._loop.cancel(channel)

    def closed(self, channel: Channel) -> None:
        try:
            self._device.closed(channel)
        except Exception:
            log.exception("%s: closed() failed", channel.name)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None
