# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic SCSI controller: logical units behind a VMBus channel.

Here are the disks, the channels and the device's callbacks. What a packet is says the channel's
:class:`~vhostvmbus.devices.scsi.session.Session`; a SCSI request is carried out, and completed, by
:class:`~vhostvmbus.devices.scsi.requests.Requests`.

Invariants: every packet is completed exactly once, whatever is in it; a malformed one costs
itself only; a unit's file stays open until the last request that uses it is completed.

The ring engine does plain READ and WRITE by the plan that it is given here
(:mod:`~vhostvmbus.devices.scsi.plan`).  The plan says what the state of the session and of the
units allows at this moment: it is made anew, before anything else happens, whenever that changes.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple, Protocol, assert_never, runtime_checkable
from uuid import UUID

from vhostvmbus.channel import Channel, Packet, PacketChannel
from vhostvmbus.device import Device
from vhostvmbus.devices.scsi import marks, sense, storvsp
from vhostvmbus.devices.scsi.answers import Complaints
from vhostvmbus.devices.scsi.disk import DiskSpec, parse_disk
from vhostvmbus.devices.scsi.lease import Lease
from vhostvmbus.devices.scsi.leaving import Leaving
from vhostvmbus.devices.scsi.plan import rules
from vhostvmbus.devices.scsi.requests import Disk, Requests, mark_of
from vhostvmbus.devices.scsi.session import Answer, CreateSubChannels, Execute, Reset, Session
from vhostvmbus.devices.scsi.storvsp import EXECUTE_SRB, Operation, SrbStatus, Version
from vhostvmbus.devices.scsi.unit import BLOCK_SIZE, Backing, Identity, LogicalUnit
from vhostvmbus.ring import Plan
from vhostvmbus.wire.errors import ChannelClosed, GuestError, OfferRefused
from vhostvmbus.wire.ntstatus import NtStatus

_log = logging.getLogger(__name__)

MAX_TRANSFER_BYTES = 2 << 20
"""Announced to the guest: one ``preadv`` still takes it (513 pages, IOV_MAX is 1024)."""
MAX_SUB_CHANNELS = 15
"""Announced to the guest: Linux takes one for each vCPU but the first, at most so many. Each has a
ring and a thread of its own, so that a request is completed on the vCPU that made it."""
MAX_LUN = 254
"""Linux scans LUNs 0 to 254 (``STORVSC_MAX_LUNS_PER_TARGET``)."""
MAX_PLANNED = 32
"""Disks in a plan: the engine looks at one rule after the other."""


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class _Open(NamedTuple):
    """An open channel: what was negotiated on it, and the right of its requests to act."""

    channel: Channel
    session: Session
    lease: Lease
    planning: threading.Lock
    """Held while the channel gets a plan: the last one made is the last one given."""


class ScsiController(Device):
    """One controller with up to 255 disks, all at path 0, target 0; the LUN tells them apart.

    Subchannels carry requests for the same units."""

    class_id = UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f")
    name = "scsi"
    max_packet_size = 256  # a vstor packet is 64 bytes; longer ones are answered, not dropped
    max_external_data = 2 * MAX_TRANSFER_BYTES
    max_external_ranges = 256
    transaction_quota = 1024
    max_channels = 1 + MAX_SUB_CHANNELS
    gather_completions = True  # what may sleep is not done on the channel's thread
    plans = True
    """Set to give the ring engine a plan; without one every packet comes to Python."""

    def __init__(
        self,
        disks: Iterable[str | DiskSpec | Backing] = (),
        *,
        instance_id: UUID | None = None,
        threads: int = 8,
        sub_channels: int = MAX_SUB_CHANNELS,
        protocol: Version = Version.V6_2,
        plans: bool | None = None,
    ) -> None:
        """Makes a controller whose LUNs 0, 1, ... are ``disks``.

        A string is read by :func:`~vhostvmbus.devices.scsi.disk.parse_disk`.  ``threads`` bounds
        the requests that sleep in the host at a time, ``sub_channels`` how many the guest may have
        besides the first channel, ``protocol`` which version it may agree upon at most; ``plans``
        overrides :attr:`plans`.  Raises ``ValueError``, ``OSError`` if there are no threads, and
        what :meth:`~vhostvmbus.devices.scsi.disk.DiskSpec.open` raises.
        """
        super().__init__()
        if not 0 <= sub_channels <= MAX_SUB_CHANNELS:
            raise ValueError(f"sub_channels is 0 to {MAX_SUB_CHANNELS}, not {sub_channels}")
        self.max_channels = 1 + sub_channels
        self._protocol = protocol
        if plans is not None:
            self.plans = plans
        if instance_id is not None:
            self.instance_id = instance_id
        self._disks: dict[int, Disk] = {}
        self._open: dict[int, _Open] = {}
        self._lock = threading.Lock()
        self._ending: set[Channel] = set()
        self._complaints = Complaints()
        self._leaving = Leaving()
        self._requests = Requests(
            self.name, threads, self._disks, self._leaving, self.replan, self._complain
        )
        self._planned = 0
        self.malformed = 0
        """Packets that were refused as malformed."""
        try:
            for disk in disks:
                self.attach(disk)
        except BaseException:
            self.close()
            raise

    # Units

    @property
    def luns(self) -> list[int]:
        """The LUNs that have a disk, ascending."""
        return sorted(self._disks)

    def unit(self, lun: int) -> LogicalUnit:
        """Returns the unit at ``lun``; raises ``KeyError`` if there is none."""
        return self._disks[lun].unit

    def attach(self, disk: str | DiskSpec | Backing, lun: int | None = None) -> int:
        """Adds a disk, at the lowest free LUN unless told; returns the LUN.

        A guest that is running is told to look for it (ENUMERATE_BUS).  Raises ``ValueError``
        if the LUN is taken or there is none left, and what opening the disk raises.
        """
        with self._lock:
            if lun is None:
                lun = next((n for n in range(MAX_LUN + 1) if n not in self._disks), MAX_LUN + 1)
            if not 0 <= lun <= MAX_LUN:
                raise ValueError(f"a LUN is 0 to {MAX_LUN}, not {lun}")
            if lun in self._disks:
                raise ValueError(f"LUN {lun} is taken")
            backing, identity = self._open_disk(disk, lun)
            unit = LogicalUnit(backing, identity, MAX_TRANSFER_BYTES // BLOCK_SIZE)
            unit.changed = unit.stragglers.gone = self.replan
            self._disks[lun] = Disk(unit)
        self._keep_marks()
        self.replan()
        self._announce()
        return lun

    def _open_disk(self, disk: str | DiskSpec | Backing, lun: int) -> tuple[Backing, Identity]:
        spec = parse_disk(disk) if isinstance(disk, str) else disk
        if isinstance(spec, DiskSpec):
            return spec.open(), spec.identity()
        return spec, DiskSpec(f"{type(spec).__qualname__}/{lun}").identity()

    def detach(self, lun: int, timeout: float = 30.0) -> None:
        """Removes a disk and closes it once the requests that use it are completed.

        New requests get INVALID LUN at once.  Raises ``KeyError`` if there is no such LUN, and
        ``TimeoutError`` if requests are still running after ``timeout`` seconds; the disk is
        gone for the guest then, and its file stays open.
        """
        with self._lock:
            disk = self._disks.pop(lun)
        disk.removed = True
        self._keep_marks()
        self.replan()
        self._announce()
        deadline = time.monotonic() + timeout
        while disk.users:
            if time.monotonic() > deadline:
                raise TimeoutError(f"LUN {lun} is still in use after {timeout} s")
            time.sleep(0.001)
        if isinstance(disk.unit.backing, _Closable):
            disk.unit.backing.close()

    def resized(self, lun: int) -> None:
        """Tells the guest that the capacity of a disk has changed (unit attention 2Ah/09h)."""
        self._disks[lun].unit.raise_attention(sense.CAPACITY_CHANGED)

    def _keep_marks(self) -> None:
        """Notes which file each disk of the running guest is, for the next back end."""
        primary = self._open.get(0)
        if primary is not None:
            kept = {lun: disk.mark for lun, disk in list(self._disks.items()) if disk.mark}
            with contextlib.suppress(ChannelClosed):
                primary.channel.note = marks.pack(kept)

    def _compare_marks(self, note: bytes) -> None:
        """Hides what is in the place of a disk that the guest has had from an earlier back end."""
        for lun, mark in marks.parse(note).items():
            disk = self._disks.get(lun)
            if disk is not None and disk.mark and disk.mark != mark:
                disk.mark = mark  # it is what the guest has had, for whoever comes next
                disk.unit.replaced = True
                _log.error(
                    "%s: LUN %d, %r, is another file than the guest has had; the guest finds no "
                    "medium until it starts again, or this is restarted with the right file",
                    self.name, lun, disk.unit.backing,
                )  # fmt: skip

    def _show_all(self) -> None:
        """Forgets which files a guest before had: this one has not seen any."""
        for disk in list(self._disks.values()):
            disk.unit.replaced = False
            disk.mark = mark_of(disk.unit.backing)

    def _announce(self) -> None:
        """Sends ENUMERATE_BUS to a guest that has finished its initialization."""
        primary = self._open.get(0)
        if primary is not None and primary.session.is_ready:
            # A channel that closes just now needs no telling.
            with contextlib.suppress(ChannelClosed):
                size = primary.session.packet_size
                primary.channel.send(
                    storvsp.notification(Operation.ENUMERATE_BUS, size), transaction_id=0
                )

    def close(self) -> None:
        """Closes every disk.  The controller must not be serving any more.

        A disk that an operation hangs on stays open, and locked, until the process ends.
        """
        self._requests.close()
        for lun, disk in self._disks.items():
            if disk.users or disk.unit.stragglers:
                _log.error("%s: LUN %d does not answer; it is not closed", self.name, lun)
            elif isinstance(disk.unit.backing, _Closable):
                disk.unit.backing.close()
        self._disks.clear()

    def __enter__(self) -> ScsiController:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def replan(self) -> None:
        """Gives every channel the plan for the present state; done by itself for all changes here.

        For a backing whose :meth:`~vhostvmbus.devices.scsi.unit.DirectBacking.direct` has another
        answer now.  When it returns, nothing is done by the plans before.
        """
        if self.plans:
            for each in list(self._open.values()):
                with each.planning:
                    if each.channel not in self._ending:
                        each.channel.set_plan(self._plan(each.session))

    def _plan(self, session: Session) -> Plan | None:
        sizes = session.request_sizes
        if not sizes:
            return None
        disks = sorted(self._disks.copy().items())[:MAX_PLANNED]
        found = [rule for lun, disk in disks for rule in rules(lun, disk.unit, sizes)]
        return Plan(found) if found else None

    # Channels

    def opened(self, channel: Channel) -> None:
        """Starts the negotiation of a channel; a subchannel's is its primary's."""
        if not channel.index:
            self._leaving.end()
            self._show_all()
        primary = self._open.get(0) if channel.index else None
        if primary is not None and primary.session.is_ready and primary.session.version is None:
            self.resumed(channel)
            return
        version = primary.session.version if primary is not None else None
        session = Session(
            max_transfer_bytes=MAX_TRANSFER_BYTES,
            max_sub_channels=self.max_channels - 1,
            max_version=self._protocol,
            version=version,
        )
        self._open[channel.index] = _Open(channel, session, Lease(), threading.Lock())
        if session.is_ready:
            self.replan()
        if not channel.index:
            self._keep_marks()

    def resumed(self, channel: Channel) -> None:
        """Takes the guest as initialized: it went on while there was no back end."""
        if not channel.index:
            self._compare_marks(channel.note)
        session = Session.resumed(
            max_transfer_bytes=MAX_TRANSFER_BYTES,
            max_sub_channels=self.max_channels - 1,
            max_version=self._protocol,
        )
        self._open[channel.index] = _Open(channel, session, Lease(), threading.Lock())
        if not channel.index:
            self._keep_marks()
        self.replan()

    def unplug_requested(self) -> None:
        """Returns when the guest has removed its disks, with all that it had to write."""
        primary = self._open.get(0)
        if primary is None or not primary.session.is_ready:
            return
        self._leaving.begin(self.luns)
        self._announce()
        self._leaving.wait(
            self.name, lambda: [each.channel for each in list(self._open.values())], self._announce
        )

    @property
    def requests(self) -> int:
        """The number of SCSI requests carried out, about: threads count without a lock."""
        planned = sum(each.channel.stats.packets_planned for each in list(self._open.values()))
        return self._requests.count + self._planned + planned

    def stats(self) -> dict[str, Any]:
        """Returns the requests carried out, the packets refused as malformed, and the disks."""
        disks = {lun: repr(disk.unit.backing) for lun, disk in sorted(self._disks.items())}
        return {"requests": self.requests, "malformed": self.malformed, "disks": disks}

    def suspended(self, channel: Channel) -> None:
        """Cancels what is outstanding if nobody waits for it any more."""
        self._ending.add(channel)  # it may hang in the engine: it is not to be waited for
        opened = self._open.get(channel.index)
        if opened is not None and not channel.draining:
            opened.lease.stop()

    def closed(self, channel: Channel) -> None:
        """Forgets the channel; with the primary, what the guest set in the mode pages as well.

        When it returns nothing of what came on the channel acts on a disk, or the disk is not ready
        until that has ended.
        """
        self._ending.discard(channel)
        opened = self._open.pop(channel.index, None)
        if opened is not None:
            if not channel.worker.is_alive():
                self._planned += channel.stats.packets_planned
            self._requests.channel_closed(channel, opened.lease)
        if not channel.index:
            self._leaving.end()
            for disk in list(self._disks.values()):
                disk.unit.reset(None)

    # Packets

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Takes one packet; it is completed here or by the pool."""
        opened = self._open[channel.index]
        session = opened.session
        sizes = session.request_sizes
        action = session.receive(packet.payload)
        if session.request_sizes != sizes:
            self.replan()
        if isinstance(action, Execute):
            self._requests.execute(packet, action.srb, opened.lease)
        elif isinstance(action, Answer):
            if action.error is not None:
                self._complain(channel, action.error)
            packet.complete(action.payload)
        elif isinstance(action, Reset):
            self._requests.reset(packet, action, opened.lease)
        elif isinstance(action, CreateSubChannels):
            packet.complete(self._create_sub_channels(channel, packet, action))
        else:
            assert_never(action)

    def _create_sub_channels(
        self, channel: Channel, packet: Packet, action: CreateSubChannels
    ) -> bytes:
        try:
            self.offer_channels(action.count)
        except OfferRefused as error:
            # The guest goes on with what it has.
            if self._complaints.allowed():
                _log.warning("%s channel %d: %s", self.name, channel.index, error)
            return self._open[channel.index].session.answer(packet.payload, error.status)
        return action.payload

    def packet_rejected(self, channel: Channel, packet: Packet, error: GuestError) -> None:
        """Refuses external data that is malformed or too large, in the protocol's own words."""
        self._complain(channel, error)
        payload = packet.payload
        session = self._open[channel.index].session
        refusal = session.answer(payload, NtStatus.INVALID_PARAMETER)
        if payload[:4] == EXECUTE_SRB:  # the only operation that changes no state of the session
            action = session.receive(payload)
            if isinstance(action, Execute):
                refusal = action.srb.answer(
                    status=NtStatus.INVALID_PARAMETER, srb_status=SrbStatus.INVALID_REQUEST
                )
        packet.complete(refusal)

    def _complain(self, channel: PacketChannel, error: GuestError) -> None:
        self.malformed += 1
        if self._complaints.allowed():
            _log.warning("%s channel %d: %s", self.name, channel.index, error)
