# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries requests out on a back end, whichever way they came.

A :class:`~.connection.Connection` does so with what it read from its socket; a front end in the
same process does so directly. Descriptors stay the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import assert_never

from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backend import BackEnd
from vhostvmbus.vhost_user.gpadl import read_list
from vhostvmbus.vhost_user.sockets import require_eventfd
from vhostvmbus.wire.errors import FrontEndError, GuestError, RefuseOpen, VmbusError
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.regions import SharedRegion

log = logging.getLogger(__name__)


def carry_out(back_end: BackEnd, message: m.DeviceWork, fds: Sequence[int]) -> None:
    """Carries ``message`` out; ``fds`` are the descriptors that it carries.

    Raises what the back end raises, which :func:`status_of` turns into an answer, and
    :class:`~.errors.WrongFdType`, which no session outlives.
    """
    match message:
        case m.AddMemReg(region):
            back_end.add_region(*_shared(region, fds[0]))
        case m.RemMemReg(region):
            back_end.remove_region(region.guest_phys_addr, region.size)
        case m.SetMemTable(regions):
            back_end.set_memory_table(
                [_shared(region, fd) for region, fd in zip(regions, fds, strict=True)]
            )
        case m.GpadlCreate(channel, gpadl_id, range_count, range_bytes):
            ranges = read_list(fds[0], range_count, range_bytes)
            back_end.gpadl_create(channel, gpadl_id, ranges)
        case m.GpadlTeardown(channel, gpadl_id):
            back_end.gpadl_teardown(channel, gpadl_id)
        case m.Open(opening):
            kick, call = fds
            require_eventfd(kick, "kick")
            require_eventfd(call, "call")
            back_end.open_channel(opening, kick, call)
        case m.Close(channel):
            back_end.close_channel(channel)
        case m.Modify(channel, target_vp):
            back_end.modify_channel(channel, target_vp)
        case m.SetInflightFd(size, offset, channels, slots):
            back_end.adopt_inflight(fds[0], size, offset, channels, slots)
        case m.Reset():
            back_end.reset()
        case m.Suspend():
            back_end.suspend()
        case m.Continue():
            back_end.go_on()
        case m.Unplug():
            back_end.unplug()
        case m.SetCodeMap(map_bytes, regions):
            where = [(item.guest_phys_addr, item.size, item.first_bit) for item in regions]
            back_end.set_code_map(fds[0], map_bytes, where)
        case _:
            assert_never(message)


def make_inflight(back_end: BackEnd, channels: int) -> tuple[m.InflightReply, list[int]]:
    """Returns the answer to ``GET_INFLIGHT_FD`` and the descriptors that go with it.

    A back end that has no region is answered for with a size of 0 and no descriptor.
    """
    try:
        region = back_end.make_inflight(channels)
    except (FrontEndError, OSError) as error:
        log.error("no in-flight region: %s", error)
        return m.InflightReply(0, 0, 0, 0), []
    reply = m.InflightReply(region.size, region.offset, region.channels, region.slots)
    return reply, [region.fd]


def status_of(error: VmbusError | OSError, message: m.Message) -> NtStatus:
    """Logs the error that ``message`` ended with, and returns the status that answers it."""
    match error:
        case FrontEndError() | RefuseOpen():
            log.warning("%s refused: %s", name_of(message), error)
            return error.status
        case GuestError():
            log.warning("%s refused: %s", name_of(message), error)
            return NtStatus.INVALID_PARAMETER
    log.error("%s failed", name_of(message), exc_info=error)
    return NtStatus.UNSUCCESSFUL


def name_of(message: m.Message) -> str:
    """Returns what the log calls ``message``."""
    name = type(message).__name__
    if isinstance(message, m.Open):
        name += f" of channel {message.opening.index}"
    return name


def _shared(region: m.MemoryRegion, fd: int) -> SharedRegion:
    return SharedRegion(region.guest_phys_addr, region.size, fd, region.mmap_offset)
