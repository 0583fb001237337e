# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters of a channel, and a brake for its log."""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ChannelStats:
    """Counters of a channel since it was opened. Bytes are payload bytes unless said otherwise."""

    packets_received: int = 0
    packets_planned: int = 0
    """The part of :attr:`packets_received` that the engine did by the device's plan."""
    packets_replayed: int = 0
    """The part of :attr:`packets_received` that a back end before this one had taken."""
    bytes_received: int = 0
    external_bytes: int = 0
    batches: int = 0
    max_batch: int = 0
    completions_sent: int = 0
    completions_received: int = 0
    packets_sent: int = 0
    bytes_sent: int = 0
    ring_full: int = 0
    max_queued: int = 0
    quota_reached: int = 0
    wakeups: int = 0
    rests: int = 0
    """How often the engine let packets gather."""
    signals_sent: int = 0
    signals_suppressed: int = 0
    code_invalidations: int = 0
    dropped: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def count_received(self, packets: int, payload_bytes: int, external_bytes: int) -> None:
        """Counts what came from the ring; on the worker, before the device sees it."""
        self.packets_received += packets
        self.bytes_received += payload_bytes
        self.external_bytes += external_bytes

    def count_planned(
        self, packets: int, completions: int, payload_bytes: int, external_bytes: int
    ) -> None:
        """Counts packets that the engine did by a plan; on the worker.

        ``completions`` is how many of them are to be completed: the others were completions.
        """
        self.count_received(packets, payload_bytes, external_bytes)
        self.packets_planned += packets
        self.completions_received += packets - completions

    def count_batches(self, batches: int, largest: int) -> None:
        """Counts what was taken from the ring at a time; on the worker."""
        self.batches += batches
        self.max_batch = max(self.max_batch, largest)

    def count_sent(
        self, completions: int = 0, packets: int = 0, payload_bytes: int = 0, signals: int = 0
    ) -> None:
        """Counts what goes to the guest: completions, and the host's own packets with their bytes.

        Under the sender's lock.
        """
        self.completions_sent += completions
        self.packets_sent += packets
        self.bytes_sent += payload_bytes
        self.signals_sent += signals

    def add(self, other: "ChannelStats") -> None:
        """Adds another channel's counters; of what is a maximum, the larger one counts."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name.startswith("max_"):
                setattr(self, name, max(mine, theirs))
            else:
                setattr(self, name, mine + theirs)

    def as_dict(self) -> dict[str, Any]:
        """Returns all counters, ready for JSON."""
        result: dict[str, Any] = {
            name: getattr(self, name) for name in self.__slots__ if name != "errors"
        }
        result["errors"] = dict(self.errors)
        return result


class RateLimitedLog:
    """A brake: ``burst`` messages pass in ``period`` seconds; it counts what it holds back.

    A guest can provoke errors as fast as it likes; the log must not grow with them.
    """

    def __init__(self, logger: logging.Logger, burst: int = 5, period: float = 10.0) -> None:
        self._logger = logger
        self._burst = burst
        self._period = period
        self._start = 0.0
        self._count = 0

    def warning(self, message: str, *args: object) -> None:
        """Logs a warning, or counts it."""
        now = time.monotonic()
        if now - self._start >= self._period:
            held_back = self._count - self._burst
            if held_back > 0:
                self._logger.warning("%d more messages like this were held back", held_back)
            self._start, self._count = now, 0
        self._count += 1
        if self._count <= self._burst:
            self._logger.warning(message, *args)
