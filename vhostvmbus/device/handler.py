# SPDX-License-Identifier: GPL-2.0-or-later
"""The way of a channel's events to its device's callbacks."""

import inspect
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from vhostvmbus.channel import Channel, Packet
from vhostvmbus.channel.deadline import Deadline, LeftBehind
from vhostvmbus.device.device import Device
from vhostvmbus.device.loop import DeviceLoop
from vhostvmbus.memory import WrittenMemory
from vhostvmbus.ring import PacketLimits
from vhostvmbus.wire.errors import GuestError, PacketError

log = logging.getLogger("vhostvmbus.device.host")  # one name for all that a device logs

STATS_SECONDS = 2.0
"""The seconds that the device's own counters may take."""


class DeviceHandler:
    """The way of a channel's events to the device: the only place that knows both."""

    def __init__(
        self,
        device: Device,
        name: str,
        written: WrittenMemory,
        left: LeftBehind,
        failed: Callable[[int, GuestError], None],
    ) -> None:
        self.left = left
        self._device = device
        self._failed = failed
        self._loop: DeviceLoop | None = None
        self._loop_lock = threading.Lock()
        self._async = inspect.iscoroutinefunction(device.packet_received)
        self.name = name
        self.limits = PacketLimits(
            device.max_packet_size, device.max_external_data, device.max_external_ranges
        )
        self.transaction_quota = device.transaction_quota
        self.gather_completions = device.gather_completions
        self.gather_microseconds = device.gather_microseconds
        self.written = written
        if not self._async:
            # Saves a call on the way of every packet.
            self.packet_received = device.packet_received  # type: ignore[method-assign,assignment]

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Delivers a packet, on the event loop if the device is asynchronous."""
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
        """Delivers a malformed packet."""
        self._device.packet_rejected(channel, packet, error)

    def processing_complete(self, channel: Channel, count: int) -> None:
        """Tells the device that the ring has run empty."""
        self._device.processing_complete(channel, count)

    @property
    def wants_processing_complete(self) -> bool:
        """Tells whether the device has such a callback."""
        return type(self._device).processing_complete is not Device.processing_complete

    def channel_failed(self, channel: Channel, error: GuestError) -> None:
        """Tells who wants to know that the channel stopped."""
        self._failed(channel.index, error)

    def device_stats(self) -> dict[str, Any]:
        """Returns the device's own counters, or what is wrong with them."""
        try:
            deadline = Deadline(STATS_SECONDS)
            return self.left.call(f"{self.name} stats", self._device.stats, deadline).get()
        except Exception as error:
            log.exception("%s: stats() failed", self.name)
            return {"error": f"{type(error).__name__}: {error}"}

    def end_tasks(self, channels: Sequence[Channel], grace: float) -> None:
        """Lets coroutines of these channels finish for ``grace`` seconds, then cancels them."""
        if self._loop is not None:
            self._loop.cancel(channels, grace)

    def close(self) -> None:
        """Ends the device's event loop."""
        loop, self._loop = self._loop, None
        if loop is not None and not loop.close():
            self.left.add(loop.thread)
