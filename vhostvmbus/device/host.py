# SPDX-License-Identifier: GPL-2.0-or-later
"""Drives one device: its memory, GPADLs and channels, as the front end's requests ask for.

Each method is one request of docs/vhost-user-vmbus.md; there is no socket in here. Methods are
called by one thread at a time (the server's); :meth:`DeviceHost.stats` by any. Invariants: a
request that is answered is done; a refused one changed nothing; one channel's failure leaves the
others.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from vhostvmbus.channel import Channel, ChannelStats, GpadlTable
from vhostvmbus.channel.closing import close_together
from vhostvmbus.channel.deadline import Deadline, LeftBehind
from vhostvmbus.device.device import Device
from vhostvmbus.device.handler import DeviceHandler
from vhostvmbus.device.inflight import Inflight
from vhostvmbus.device.lingering import Lingering
from vhostvmbus.device.offer import offer_of
from vhostvmbus.device.offers import ChannelOffers
from vhostvmbus.device.stillness import Stillness
from vhostvmbus.device.unplug import Unplugging
from vhostvmbus.memory import CodeMap, GuestMemory, Region, wait_until_unused
from vhostvmbus.ring import InflightRegion, Ring
from vhostvmbus.wire.errors import (
    ChannelStateError,
    ChannelUnknown,
    DeviceTimeout,
    FrontEndError,
    GuestError,
    MemoryInUse,
    OfferRefused,
    RefuseOpen,
    RegionBusy,
    RegionInvalid,
)
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import SharedRegion
from vhostvmbus.wire.vmbus import PAGE_SIZE

log = logging.getLogger(__name__)

Invalidate = Callable[[list[tuple[int, int]]], None]
REQUEST_SECONDS = 7.0
"""The seconds that all that is waited for behind one request may take; the front end waits 10."""
CLOSING_SECONDS = REQUEST_SECONDS
"""The same, for a request that closes channels or gives memory up."""
HURRY_SECONDS = 1.5
"""The seconds that are left for the end of a connection after a request that was not answered."""
PATIENCE = 3.0
"""The seconds that packets get to complete when the memory of their external data is removed."""
LAST_PATIENCE = 1.5
"""The seconds after that, when the memory has been taken from them."""
GRACE = 1.0
"""The seconds that packets get to complete when their channel is closed."""


class DeviceHost:
    """The owner of a device's memory, GPADLs and channels.

    ``channel_failed`` (optional) is called for each channel that stopped because of the guest.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.name = device.name or type(device).__name__
        self.left = LeftBehind(self.name)
        """The threads of the device's code that do not return."""
        self.memory = GuestMemory()
        self.gpadls = GpadlTable(self.memory, self.left)
        self.channel_failed: Callable[[int, GuestError], None] | None = None
        self._offer = offer_of(device)
        self.offers = ChannelOffers(device.channels, device.max_channels)
        device.serve_with(self.offers)
        self._unplugging = Unplugging(
            self.name, device.unplug_requested, self.offers.let_go, self.left
        )
        self._stillness = Stillness(self.name, device, self.left)
        self._channels: dict[int, Channel] = {}
        self._inflight = Inflight(self.name)
        self._handler = DeviceHandler(
            device, self.name, self.memory.written, self.left, self._channel_failed
        )
        self._disconnect_seconds = CLOSING_SECONDS
        self._lingering = Lingering(self.left)
        self._lock = threading.RLock()
        self._stats_lock = threading.Lock()  # a closing channel is counted once
        self._past = ChannelStats()

    def _channel_failed(self, index: int, error: GuestError) -> None:
        if self.channel_failed is not None:
            self.channel_failed(index, error)

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
        deadline = Deadline(CLOSING_SECONDS)
        with self._lock:
            self.memory.remove_region(guest_phys_addr, size, self._release)
            self._close_rings_in([(guest_phys_addr, size)], deadline)

    def set_memory_table(self, table: Sequence[SharedRegion]) -> None:
        """Applies SET_MEM_TABLE: all of ``table``, or what there was. The caller keeps the
        descriptors.

        What is in both stays mapped; what goes is given up as :meth:`remove_region` does it.
        """
        deadline = Deadline(CLOSING_SECONDS)
        with self._lock:
            gone = self.memory.set_table(table, self._release)
            ranges = [(region.guest_phys_addr, region.size) for region in gone]
            self._close_rings_in(ranges, deadline)

    def _release(self, regions: Sequence[Region]) -> None:
        """Ends all uses of memory that goes. Raises :exc:`RegionBusy`."""
        patience = Deadline(PATIENCE)
        for gpadl in self.gpadls:
            if gpadl.mapping is not None and any(
                gpadl.touches(region.guest_phys_addr, region.size) for region in regions
            ):
                gpadl.end_mapping(self.left, patience)
        try:
            wait_until_unused(regions, patience.left)
        except RegionBusy:
            last = Deadline(LAST_PATIENCE)
            for region in regions:
                for channel in self._channels.values():
                    channel.drop_packets_in(region.guest_phys_addr, region.size, last.left)
            wait_until_unused(regions, last.left)

    def _close_rings_in(self, ranges: Sequence[tuple[int, int]], deadline: Deadline) -> None:
        """Closes the channels whose ring lies in memory that has gone."""
        found = [
            index
            for index, channel in self._channels.items()
            if channel.ring_gpadl is not None
            and any(channel.ring_gpadl.touches(*where) for where in ranges)
        ]
        for index in found:
            log.warning("%s: its ring's memory is removed", self._channels[index].name)
        self._close(found, deadline)

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
        return self._inflight.use(
            InflightRegion.create(channels, quota, limits), bool(self._channels)
        )

    def adopt_inflight(self, fd: int, size: int, offset: int, channels: int, slots: int) -> None:
        """Takes over the region of the back end before this one, for SET_INFLIGHT_FD.

        The caller keeps ``fd``. Raises :exc:`InflightInvalid`, or :exc:`ChannelStateError` while a
        channel is open.
        """
        self._inflight.use(
            InflightRegion.adopt(fd, size, offset, channels, slots), bool(self._channels)
        )

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
        deadline = Deadline(CLOSING_SECONDS)
        with self._lock:
            gpadl = self.gpadls.get(gpadl_id)
            users = [i for i, opened in self._channels.items() if opened.ring_gpadl is gpadl]
            self._close(users, deadline.within(0.8 * CLOSING_SECONDS))
            if not self.gpadls.remove(gpadl_id, deadline):
                self._give_up(f"GPADL {gpadl_id:#x} is used by somebody who does not return")

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
        deadline = Deadline(REQUEST_SECONDS)
        self._check_index(index)
        if index in self._channels:
            raise ChannelStateError(f"channel {index} is open already")
        self._lingering.check(self.gpadls)
        gpadl = self.gpadls.get(opening.gpadl_id)
        if gpadl.channel != index:
            raise FrontEndError(f"GPADL {opening.gpadl_id:#x} belongs to channel {gpadl.channel}")
        ring = Ring(
            self.memory, gpadl.ring_pfns(), opening.ring_offset, limits=self._handler.limits
        )
        try:
            self._inflight.record(opening, ring)
            channel = Channel(self._handler, opening, ring, kick_fd, call_fd, self.gpadls)
        except BaseException:
            ring.close()
            raise
        channel.ring_gpadl = gpadl
        device = self.device
        told = False
        try:
            if opening.resumed:
                self._call(channel, "resumed", device.resumed, deadline.within(3.0))
            else:
                self._call(channel, "opened", device.opened, deadline.within(3.0))
            told = True
            # Known before it runs: what started() does may come back here at once.
            self._channels[index] = channel
            self._call(channel, "started", device.started, deadline.within(2.0))
            self.offers.opened(index)
            channel.begin()
            if type(device).post_started is not Device.post_started:
                channel.run_beside(lambda: device.post_started(channel))
            if opening.resumed:
                # The back end before may have ended between a completion and its signal.
                channel.signal()
        except BaseException:
            self._channels.pop(index, None)
            self._end([channel], deadline, grace=0.0, publish=False, told=told)
            raise

    def _call(
        self,
        channel: Channel,
        name: str,
        callback: Callable[[Channel], None],
        deadline: Deadline,
    ) -> None:
        """Calls one of the device's callbacks, and raises what it raises.

        Raises :exc:`RefuseOpen` if it does not return.
        """
        try:
            outcome = self.left.call(f"{channel.name} {name}", lambda: callback(channel), deadline)
        except DeviceTimeout as error:
            raise RefuseOpen(NtStatus.IO_TIMEOUT, str(error)) from error
        if outcome.error is not None and not isinstance(outcome.error, Exception):
            raise RefuseOpen(message=f"{outcome.error!r} in the device") from outcome.error
        outcome.get()

    def close_channel(self, index: int) -> None:
        """Closes a channel, for VMBUS_CLOSE.

        Returns when neither ring nor external data is touched any more. Raises
        :exc:`MemoryInUse` if somebody touches them who does not return.
        """
        with self._lock:
            self._check_index(index)
            if index not in self._channels:
                raise ChannelStateError(f"channel {index} is not open")
            self._close([index], Deadline(CLOSING_SECONDS))

    def _close(self, indices: Sequence[int], deadline: Deadline) -> None:
        """Closes channels, the last first. Raises :exc:`MemoryInUse`."""
        channels = [self._channels[index] for index in sorted(indices, reverse=True)]
        touching = self._end(channels, deadline, grace=GRACE, publish=False)
        for index in indices:
            self._inflight.forget(index)
        if touching:
            self._give_up("somebody who does not return uses guest memory")

    def _give_up(self, reason: str) -> NoReturn:
        """Has the connection end, at once: there is not much left of the front end's patience."""
        self._disconnect_seconds = HURRY_SECONDS
        raise MemoryInUse(reason)

    def _end(
        self,
        channels: Sequence[Channel],
        deadline: Deadline,
        *,
        grace: float,
        publish: bool,
        told: bool = True,
    ) -> bool:
        """Ends channels together; the device hears of it if it was ``told`` of them.

        Returns whether somebody may be touching guest memory still.
        """
        closing = deadline.within(0.75 * deadline.left)

        def suspended(channel: Channel) -> Callable[[], None]:
            return lambda: self.device.suspended(channel) if told else None

        close_together(
            [(channel.end, suspended(channel)) for channel in channels],
            closing,
            lambda: self._handler.end_tasks(channels, grace),
            grace=grace,
            publish=publish,
        )
        for behind, channel in enumerate(channels):
            index = channel.index
            self._lingering.add(channel)
            with self._stats_lock:
                self._past.add(channel.end_stats)
                self._channels.pop(index, None)
            if index == 0:
                self.offers.forget()
            if told:
                self._tell_closed(channel, deadline.share(len(channels) - behind))
        return any(channel.end.touching for channel in channels)

    def _tell_closed(self, channel: Channel, deadline: Deadline) -> None:
        try:
            self._call(channel, "closed", self.device.closed, deadline)
        except DeviceTimeout as error:
            log.error("%s: the device has not ended: %s", channel.name, error)
            channel.end.unended = True
        except Exception:
            log.exception("%s: closed() failed", channel.name)

    def modify_channel(self, index: int, target_vp: int) -> None:
        """Logs which virtual processor gets the channel's interrupt, for VMBUS_MODIFY."""
        self._check_index(index)
        channel = self._channels.get(index)
        if channel is None:
            raise ChannelStateError(f"channel {index} is not open")
        channel.target_vp = target_vp

    def reset(self) -> None:
        """Closes every channel, subchannels first, and forgets every GPADL, for VMBUS_RESET."""
        with self._lock:
            touching = self._reset(Deadline(CLOSING_SECONDS), publish=False)
            self._inflight.forget()
            if touching:
                try:
                    self.memory.renew()
                except (RegionInvalid, MemoryError) as error:
                    self._give_up(f"guest memory cannot be taken from who uses it: {error}")

    def _reset(self, deadline: Deadline, publish: bool) -> bool:
        """Returns whether somebody may be touching guest memory still."""
        channels = [self._channels[index] for index in sorted(self._channels, reverse=True)]
        last = deadline.within(0.8 * deadline.left)
        touching = self._end(channels, last, grace=GRACE, publish=publish)
        self.offers.forget()
        return not self.gpadls.clear(deadline) or touching

    def suspend(self) -> None:
        """Has all open channels stand still, for VMBUS_SUSPEND. Raises :exc:`NotStill`."""
        with self._lock:
            self._stillness.begin(self._channels.values())

    def go_on(self) -> None:
        """Has the channels that stand still go on, for VMBUS_CONTINUE."""
        with self._lock:
            self._stillness.end(self._channels.values())

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
        deadline = Deadline(self._disconnect_seconds)
        self._disconnect_seconds = CLOSING_SECONDS
        with self._lock:
            try:
                publish = not self._stillness.suspended
                self._reset(deadline.within(0.7 * deadline.left), publish=publish)
                self._stillness.end(())
                self._unplugging.end(deadline.within(0.5 * deadline.left))
                self._inflight.end()
            finally:
                self.memory.written.use_code_map(None)
                self.memory.close(deadline.left)

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
        with self._stats_lock:  # what follows may wait, for a device's transfer on the disk
            open_channels = sorted(self._channels.items())
            totals.add(self._past)
        channels = [channel.as_dict() for _, channel in open_channels]
        for _, channel in open_channels:
            totals.add(channel.end_stats)
        return {
            "name": self.name,
            "class_id": str(self._offer.class_id),
            "memory_regions": len(regions),
            "memory_bytes": sum(region.size for region in regions),
            "gpadls": len(self.gpadls),
            "gpadl_bytes": self.gpadls.pages * PAGE_SIZE,
            "code_map": self.memory.written.watched,
            "inflight_slots": self._inflight.slots,
            "inflight_errors": self._inflight.errors,
            "totals": totals.as_dict(),
            "channels": channels,
            "threads_left_behind": self.left.count,
            "late": self.left.late,
            "suspended": self._stillness.suspended,
            "device": self._handler.device_stats(),
        }
