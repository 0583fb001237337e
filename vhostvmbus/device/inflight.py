# SPDX-License-Identifier: GPL-2.0-or-later
"""The in-flight region of a connection, as the device's host has it: one, or none."""

import logging

from vhostvmbus.ring import InflightRegion, Ring
from vhostvmbus.wire.errors import ChannelStateError, InflightInvalid
from vhostvmbus.wire.opening import Opening

log = logging.getLogger(__name__)


class Inflight:
    """The region that packets in flight are recorded in, if there is one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._region: InflightRegion | None = None
        self.errors = 0
        """Counts how often the region could not be used."""

    @property
    def slots(self) -> int:
        """Returns how many packets of each channel it has room for; 0 without a region."""
        return self._region.slots if self._region else 0

    def use(self, region: InflightRegion, channels_open: bool) -> InflightRegion:
        """Uses ``region`` from now on. Raises :exc:`ChannelStateError` while a channel is open."""
        if channels_open:
            region.close()
            raise ChannelStateError("a channel is open")
        self.end()
        self._region = region
        return region

    def end(self) -> None:
        """Records nothing any more."""
        region, self._region = self._region, None
        if region is not None:
            region.close()

    def record(self, opening: Opening, ring: Ring) -> None:
        """Has the ring record its packets; what is broken is reported, and an empty part used."""
        if self._region is None:
            return
        for resume in (True, False) if opening.resumed else (False,):
            try:
                self._region.record(opening.index, ring, resume=resume)
                break
            except InflightInvalid as error:
                self.errors += 1
                log.error("%s/%d: %s", self._name, opening.index, error)
        if ring.to_replay:
            log.info("%s/%d: %d packets once more", self._name, opening.index, ring.to_replay)

    def forget(self, index: int | None = None) -> None:
        """Empties one channel's part, or all."""
        if self._region is not None:
            try:
                self._region.clear(index)
            except InflightInvalid as error:
                self.errors += 1
                log.error("%s: %s", self._name, error)
