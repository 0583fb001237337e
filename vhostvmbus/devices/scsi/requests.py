# SPDX-License-Identifier: GPL-2.0-or-later
"""The requests of all channels, from their packets to their completions.

A SCSI request is carried out by :func:`~vhostvmbus.devices.scsi.commands.execute` on the unit that
it addresses. Cached reads and plain writes are done on the channel's own thread, because handing
them over costs more than they do. Whatever may sleep (flushes, discards, verifications, reads that
the host has to fetch) is done on a pool of threads, so that it does not hold up the queue behind
it.

Invariants: a disk is used as long as a packet is among its users; a request acts under the lease of
its channel, and when :meth:`Requests.channel_closed` returned, what came on that channel changes no
disk any more, or the disk is not ready.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from vhostvmbus.channel import Channel, Packet, PacketChannel
from vhostvmbus.devices.scsi import sense
from vhostvmbus.devices.scsi.answers import answer
from vhostvmbus.devices.scsi.cdb import Opcode
from vhostvmbus.devices.scsi.commands import Outcome, execute, is_slow
from vhostvmbus.devices.scsi.lease import Cancelled, Lease, Patience
from vhostvmbus.devices.scsi.leaving import Leaving
from vhostvmbus.devices.scsi.marks import Marked
from vhostvmbus.devices.scsi.pool import IoPool
from vhostvmbus.devices.scsi.resets import Barrier, Barriers
from vhostvmbus.devices.scsi.session import Reset
from vhostvmbus.devices.scsi.storvsp import Operation, Srb, SrbStatus
from vhostvmbus.devices.scsi.unit import Backing, DataBuffer, LogicalUnit, NoData, Request
from vhostvmbus.wire.errors import GuestError, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus

_log = logging.getLogger(__name__)

CLOSE_SECONDS: Final = 5.0
"""The seconds that the end waits for operations that the host is still at."""
_NO_DATA: Final = NoData()


def mark_of(backing: Backing) -> bytes:
    """Returns what tells a disk from others, empty if nothing does."""
    return backing.mark() if isinstance(backing, Marked) else b""


class Disk:
    """An attached disk: its logical unit and the packets that are using it."""

    __slots__ = ("mark", "removed", "unit", "users")

    def __init__(self, unit: LogicalUnit) -> None:
        self.unit = unit
        self.mark = mark_of(unit.backing)
        """The mark of the disk that the guest has had; empty if the backing has none."""
        self.users: set[Packet] = set()
        self.removed = False


class Requests:
    """Carries requests out on ``disks``, which its owner adds to and takes from.

    ``replan`` is called when what the engine may do by itself has changed, ``complain`` with a
    guest's mistake.
    """

    def __init__(
        self,
        name: str,
        threads: int,
        disks: Mapping[int, Disk],
        leaving: Leaving,
        replan: Callable[[], None],
        complain: Callable[[PacketChannel, GuestError], None],
    ) -> None:
        """Starts ``threads`` threads. Raises ``ValueError``, and ``OSError`` if there are none."""
        self.count = 0
        """Requests carried out, about: threads count without a lock."""
        self._name = name
        self._disks = disks
        self._leaving = leaving
        self._replan = replan
        self._complain = complain
        self._patience = Patience()
        self._resets = Barriers()
        self._pool = IoPool(threads, f"{name}-io")

    def close(self) -> None:
        """Returns when nothing is carried out any more, or after :data:`CLOSE_SECONDS`."""
        self._pool.close(CLOSE_SECONDS)

    def channel_closed(self, channel: Channel, lease: Lease) -> None:
        """Ends what came on a channel. What hangs in the host makes its disk not ready."""
        left = lease.end(self._patience.deadline())
        if channel.worker.is_alive():
            # It may be doing a plan, on any disk, and has more of it to do.
            left += 1
            self._await(channel.worker, [disk.unit for disk in list(self._disks.values())])
        if left:
            _log.error(
                "%s channel %d is closed, and the host is still at %d of its operations; "
                "their disks are not ready until these have ended",
                self._name,
                channel.index,
                left,
            )
            # What is open yet may be transferring, and is not to be waited for here.
            self._pool.submit(self._replan)
        for barrier in self._resets.closed(channel):
            self._pool.submit(partial(self._reset_now, barrier))

    def _await(self, worker: threading.Thread, units: list[LogicalUnit]) -> None:
        """Has ``units`` be not ready until a thread has ended."""
        for unit in units:
            unit.stragglers.add()

        def wait() -> None:
            worker.join()
            for unit in units:
                unit.stragglers.remove()

        try:
            threading.Thread(target=wait, name=f"{self._name} closed", daemon=True).start()
        except RuntimeError:  # there are no more threads: one of ours has to do it
            self._pool.submit(wait)

    def execute(self, packet: Packet, srb: Srb, lease: Lease) -> None:
        """Carries a request out and completes its packet, here or in the pool."""
        data: DataBuffer = packet.external_data or _NO_DATA
        request = Request(srb.cdb, data, min(len(data), srb.transfer_length), lease)
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
            self._pool.submit(partial(self._finish_later, packet, srb, disk, request))
        else:
            self._finish(packet, srb, disk, request, here)

    def _finish_later(self, packet: Packet, srb: Srb, disk: Disk, request: Request) -> None:
        """Carries a request out in the pool, unless its channel was closed meanwhile."""
        if packet.completed:
            disk.users.discard(packet)
            self._passed(packet)
        else:
            self._finish(packet, srb, disk, request, True)

    def _finish(
        self, packet: Packet, srb: Srb, disk: Disk | None, request: Request, here: bool
    ) -> None:
        """Carries a request out and completes its packet, on whatever thread."""
        unit = disk.unit if disk is not None else None
        self.count += 1
        try:
            looking = here and srb.cdb[0] == Opcode.REPORT_LUNS and not self._leaving.active
            luns = sorted(self._disks) if looking else []
            outcome = execute(unit, request, srb.cdb_length, luns)
            if unit is not None and outcome.sense is not None and not srb.takes_sense:
                unit.kept_sense = outcome.sense
            payload = answer(srb, outcome)
        except Cancelled:
            payload = b""  # nobody gets it: the channel is closed
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
                if self._resets:
                    self._passed(packet)

    def reset(self, packet: Packet, reset: Reset, lease: Lease) -> None:
        """Resets units, and completes the packet, once the requests before it are completed."""
        # What the engine does by itself on other channels is over when there is a plan anew.
        self._replan()
        barrier = Barrier(reset, packet, lease)
        users = [
            disk.users
            for lun, disk in list(self._disks.items())
            if reset.operation is not Operation.RESET_LUN or lun == reset.lun
        ]
        if self._resets.add(barrier, users):
            self._reset_now(barrier)

    def _passed(self, packet: Packet) -> None:
        """Carries out the resets that waited for this packet alone."""
        for barrier in self._resets.passed(packet):
            self._reset_now(barrier)

    def _reset_now(self, barrier: Barrier) -> None:
        reset = barrier.reset
        try:
            with barrier.lease.step():
                if reset.operation is Operation.RESET_LUN:
                    disk = self._disks.get(reset.lun) if not (reset.path or reset.target) else None
                    if disk is not None:
                        disk.unit.reset(sense.DEVICE_RESET)
                else:
                    for disk in list(self._disks.values()):
                        disk.unit.reset(sense.BUS_RESET, tell=False)
                    self._replan()
            barrier.packet.complete(reset.payload)
        except Cancelled:
            _log.debug("%s: a reset's channel was closed", self._name)
        except VmbusError as error:
            _log.debug("completion not delivered: %s", error)
