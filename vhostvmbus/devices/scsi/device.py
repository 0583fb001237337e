# SPDX-License-Identifier: GPL-2.0-or-later
"""The synthetic SCSI controller: logical units behind a VMBus channel.

A packet takes this way: the channel's :class:`~vhostvmbus.devices.scsi.session.Session` says
what it is; a SCSI request is carried out by
:func:`~vhostvmbus.devices.scsi.commands.execute` on the unit it addresses and completed.

Cached reads and plain writes are done on the channel's own thread, because handing them over costs
more than they do. Whatever may sleep (flushes, discards, verifications, reads that the host has
to fetch) is done on a pool of threads, so that it does not hold up the queue behind it.

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
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, assert_never, runtime_checkable
from uuid import UUID

from vhostvmbus.channel import Channel, Packet, PacketChannel
from vhostvmbus.device import Device
from vhostvmbus.devices.scsi import sense, storvsp
from vhostvmbus.devices.scsi.answers import Complaints, answer
from vhostvmbus.devices.scsi.cdb import Opcode
from vhostvmbus.devices.scsi.commands import Outcome, execute, is_slow
from vhostvmbus.devices.scsi.disk import DiskSpec, parse_disk
from vhostvmbus.devices.scsi.leaving import Leaving
from vhostvmbus.devices.scsi.plan import rules
from vhostvmbus.devices.scsi.session import Answer, CreateSubChannels, Execute, Reset, Session
from vhostvmbus.devices.scsi.storvsp import EXECUTE_SRB, Operation, Srb, SrbStatus
from vhostvmbus.devices.scsi.unit import (
    BLOCK_SIZE,
    Backing,
    DataBuffer,
    Identity,
    LogicalUnit,
    NoData,
    Request,
)
from vhostvmbus.ring import Plan
from vhostvmbus.wire.errors import ChannelClosed, GuestError, OfferRefused, VmbusError
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
_NO_DATA = NoData()


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class _Disk:
    """An attached disk: its logical unit and the packets that are using it."""

    __slots__ = ("removed", "unit", "users")

    def __init__(self, unit: LogicalUnit) -> None:
        self.unit = unit
        self.users: set[Packet] = set()
        self.removed = False


class _Barrier:
    """A reset that waits for the packets taken before it."""

    __slots__ = ("packet", "pending", "reset")

    def __init__(self, reset: Reset, packet: Packet) -> None:
        self.reset = reset
        self.packet = packet
        self.pending: set[Packet] = set()


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
        plans: bool | None = None,
    ) -> None:
        """Makes a controller whose LUNs 0, 1, ... are ``disks``.

        A string is read by :func:`~vhostvmbus.devices.scsi.disk.parse_disk`.  ``threads`` bounds
        the requests that sleep in the host at a time, ``sub_channels`` how many the guest may have
        besides the first channel; ``plans`` overrides :attr:`plans`.  Raises ``ValueError`` and
        what :meth:`~vhostvmbus.devices.scsi.disk.DiskSpec.open` raises.
        """
        super().__init__()
        if not 0 <= sub_channels <= MAX_SUB_CHANNELS:
            raise ValueError(f"sub_channels is 0 to {MAX_SUB_CHANNELS}, not {sub_channels}")
        self.max_channels = 1 + sub_channels
        if plans is not None:
            self.plans = plans
        if instance_id is not None:
            self.instance_id = instance_id
        self._disks: dict[int, _Disk] = {}
        self._sessions: dict[int, tuple[Channel, Session]] = {}
        self._barriers: list[_Barrier] = []
        self._lock = threading.Lock()
        self._planning = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"{self.name}-io")
        self._complaints = Complaints()
        self._leaving = Leaving()
        self._requests = 0
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
            backing, identity = self._open(disk, lun)
            unit = LogicalUnit(backing, identity, MAX_TRANSFER_BYTES // BLOCK_SIZE)
            unit.changed = self.replan
            self._disks[lun] = _Disk(unit)
        self.replan()
        self._announce()
        return lun

    def _open(self, disk: str | DiskSpec | Backing, lun: int) -> tuple[Backing, Identity]:
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

    def _announce(self) -> None:
        """Sends ENUMERATE_BUS to a guest that has finished its initialization."""
        for index, (channel, session) in list(self._sessions.items()):
            if index == 0 and session.is_ready:
                # A channel that closes just now needs no telling.
                with contextlib.suppress(ChannelClosed):
                    channel.send(storvsp.notification(Operation.ENUMERATE_BUS), transaction_id=0)

    def close(self) -> None:
        """Closes every disk.  The controller must not be serving any more."""
        self._pool.shutdown(wait=True)
        for disk in self._disks.values():
            if isinstance(disk.unit.backing, _Closable):
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
            with self._planning:
                for channel, session in list(self._sessions.values()):
                    channel.set_plan(self._plan(session))

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
        primary = self._sessions.get(0) if channel.index else None
        if primary is not None and primary[1].is_ready and primary[1].version is None:
            self.resumed(channel)
            return
        version = primary[1].version if primary is not None else None
        session = Session(
            max_transfer_bytes=MAX_TRANSFER_BYTES,
            max_sub_channels=self.max_channels - 1,
            version=version,
        )
        self._sessions[channel.index] = (channel, session)
        if session.is_ready:
            self.replan()

    def resumed(self, channel: Channel) -> None:
        """Takes the guest as initialized: it went on while there was no back end."""
        session = Session.resumed(
            max_transfer_bytes=MAX_TRANSFER_BYTES, max_sub_channels=self.max_channels - 1
        )
        self._sessions[channel.index] = (channel, session)
        self.replan()

    def unplug_requested(self) -> None:
        """Returns when the guest has removed its disks, with all that it had to write."""
        primary = self._sessions.get(0)
        if primary is None or not primary[1].is_ready:
            return
        self._leaving.begin(self.luns)
        self._announce()
        self._leaving.wait(self.name, lambda: [each for each, _ in list(self._sessions.values())])

    @property
    def requests(self) -> int:
        """The number of SCSI requests carried out, about: threads count without a lock."""
        open_channels = [channel for channel, _ in list(self._sessions.values())]
        planned = sum(channel.stats.packets_planned for channel in open_channels)
        return self._requests + self._planned + planned

    def stats(self) -> dict[str, Any]:
        """Returns the requests carried out, the packets refused as malformed, and the disks."""
        disks = {lun: repr(disk.unit.backing) for lun, disk in sorted(self._disks.items())}
        return {"requests": self.requests, "malformed": self.malformed, "disks": disks}

    def closed(self, channel: Channel) -> None:
        """Forgets the channel; with the primary, what the guest set in the mode pages as well."""
        if self._sessions.pop(channel.index, None) is not None:
            self._planned += channel.stats.packets_planned
        if not channel.index:
            self._leaving.end()
            for disk in list(self._disks.values()):
                disk.unit.reset(None)

    # Packets

    def packet_received(self, channel: Channel, packet: Packet) -> None:
        """Takes one packet; it is completed here or by the pool."""
        session = self._sessions[channel.index][1]
        sizes = session.request_sizes
        action = session.receive(packet.payload)
        if session.request_sizes != sizes:
            self.replan()
        if isinstance(action, Execute):
            self._execute(packet, action.srb)
        elif isinstance(action, Answer):
            if action.error is not None:
                self._complain(channel, action.error)
            packet.complete(action.payload)
        elif isinstance(action, Reset):
            self._reset(packet, action)
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
            return storvsp.answer_control(packet.payload, error.status)
        return action.payload

    def packet_rejected(self, channel: Channel, packet: Packet, error: GuestError) -> None:
        """Refuses external data that is malformed or too large, in the protocol's own words."""
        self._complain(channel, error)
        payload = packet.payload
        refusal = storvsp.answer_control(payload, NtStatus.INVALID_PARAMETER)
        if payload[:4] == EXECUTE_SRB:  # the only operation that changes no state of the session
            action = self._sessions[channel.index][1].receive(payload)
            if isinstance(action, Execute):
                refusal = action.srb.answer(
                    status=NtStatus.INVALID_PARAMETER, srb_status=SrbStatus.INVALID_REQUEST
                )
        packet.complete(refusal)

    def _complain(self, channel: PacketChannel, error: GuestError) -> None:
        self.malformed += 1
        if self._complaints.allowed():
            _log.warning("%s channel %d: %s", self.name, channel.index, error)

    def _execute(self, packet: Packet, srb: Srb) -> None:
        data: DataBuffer = packet.external_data or _NO_DATA
        request = Request(srb.cdb, data, min(len(data), srb.transfer_length))
        here = not (srb.path or srb.target)
        disk = self._disks.get(srb.lun) if here else None
        if disk is not None and self._leaving.hides(srb.lun, srb.cdb[0]):
            disk = None
        if disk is not None:
            disk.users.add(packet)
            if disk.removed:
                disk.users.discard(packet)
                disk = None
        if disk is None:
            self._finish(packet, srb, None, request, here)
        elif is_slow(disk.unit, srb.cdb):
            self._pool.submit(self._finish_later, packet, srb, disk, request)
        else:
            self._finish(packet, srb, disk, request, here)

    def _finish_later(self, packet: Packet, srb: Srb, disk: _Disk, request: Request) -> None:
        """Carries a request out in the pool, unless its channel was closed meanwhile."""
        if packet.completed:
            disk.users.discard(packet)
            self._passed(packet)
        else:
            self._finish(packet, srb, disk, request, True)

    def _finish(
        self, packet: Packet, srb: Srb, disk: _Disk | None, request: Request, here: bool
    ) -> None:
        """Carries a request out and completes its packet, on whatever thread."""
        unit = disk.unit if disk is not None else None
        self._requests += 1
        try:
            looking = here and srb.cdb[0] == Opcode.REPORT_LUNS and not self._leaving.active
            luns = self.luns if looking else []
            payload = answer(srb, execute(unit, request, srb.cdb_length, luns))
        except VmbusError as error:
            # The guest's pages are gone, or the channel is.
            if isinstance(error, GuestError):
                self._complain(packet.channel, error)
            payload = srb.answer(
                status=NtStatus.INVALID_PARAMETER, srb_status=SrbStatus.INVALID_REQUEST
            )
        except Exception:
            _log.exception("a defect: CDB %s", srb.cdb.hex(" "))
            payload = answer(srb, Outcome.failed(sense.INTERNAL_FAILURE))
        try:
            packet.complete(payload)
        except VmbusError as error:
            _log.debug("completion not delivered: %s", error)
        finally:
            if disk is not None:
                disk.users.discard(packet)
                if self._barriers:
                    self._passed(packet)

    # Resets

    def _reset(self, packet: Packet, reset: Reset) -> None:
        # What the engine does by itself on other channels is over when there is a plan anew.
        self.replan()
        barrier = _Barrier(reset, packet)
        with self._lock:
            self._barriers.append(barrier)
            for lun, disk in self._disks.items():
                if reset.operation is not Operation.RESET_LUN or lun == reset.lun:
                    barrier.pending |= disk.users.copy()
            done = not barrier.pending
            if done:
                self._barriers.remove(barrier)
        if done:
            self._reset_now(barrier)

    def _passed(self, packet: Packet) -> None:
        """Carries out the resets that waited for this packet alone."""
        due = []
        with self._lock:
            for barrier in list(self._barriers):
                barrier.pending.discard(packet)
                if not barrier.pending:
                    self._barriers.remove(barrier)
                    due.append(barrier)
        for barrier in due:
            self._reset_now(barrier)

    def _reset_now(self, barrier: _Barrier) -> None:
        reset = barrier.reset
        if reset.operation is Operation.RESET_LUN:
            disk = self._disks.get(reset.lun) if not (reset.path or reset.target) else None
            if disk is not None:
                disk.unit.reset(sense.DEVICE_RESET)
        else:
            for disk in list(self._disks.values()):
                disk.unit.reset(sense.BUS_RESET, tell=False)
            self.replan()
        try:
            barrier.packet.complete(reset.payload)
        except VmbusError as error:
            _log.debug("completion not delivered: %s", error)
