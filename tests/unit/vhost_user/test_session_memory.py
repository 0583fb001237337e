# SPDX-License-Identifier: GPL-2.0-or-later
"""The memory table of a session, and its limits."""

from __future__ import annotations

from tests.support.vhost_user_session import BackEnd, region
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.session import Refused
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening


def test_overlapping_regions() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0x10_0000)), 1) == 0
    for start, size in [
        (0x10_0000, 0x10_0000),
        (0x1F_F000, 0x1000),
        (0xF_F000, 0x2000),
        (0, 1 << 40),
    ]:
        event = back_end.event(m.AddMemReg(region(start, size)), 1)
        assert isinstance(event, Refused)
        assert event.refusal.status is NtStatus.CONFLICTING_ADDRESSES
        assert len(event.fds) == 1
        assert back_end.status() == NtStatus.CONFLICTING_ADDRESSES
    assert back_end.call(m.AddMemReg(region(0x20_0000)), 1) == 0
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0


def test_a_region_that_was_refused_does_not_exist() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1, NtStatus.NO_MEMORY) == NtStatus.NO_MEMORY
    assert back_end.call(m.RemMemReg(region(0))) == NtStatus.INVALID_PARAMETER
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    assert back_end.call(m.RemMemReg(region(0))) == 0
    assert back_end.call(m.RemMemReg(region(0))) == NtStatus.INVALID_PARAMETER


def test_removal_names_the_region_exactly() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0x1000, 0x1000, 0x5000)), 1) == 0
    for wrong in [
        region(0x1000, 0x2000, 0x5000),
        region(0x1000, 0x1000, 0x6000),
        region(0x2000, 0x1000, 0x5000),
    ]:
        assert back_end.call(m.RemMemReg(wrong)) == NtStatus.INVALID_PARAMETER
    # "the mmap offset is ignored"; a descriptor may come along
    assert back_end.call(m.RemMemReg(m.MemoryRegion(0x1000, 0x1000, 0x5000, 0x7000)), 1) == 0


def test_memory_slots() -> None:
    back_end = BackEnd(limits=ConnectionLimits(mem_slots=2)).negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    assert back_end.call(m.AddMemReg(region(1 << 30)), 1) == 0
    refused = back_end.call(m.AddMemReg(region(2 << 30)), 1)
    assert refused == NtStatus.INSUFFICIENT_RESOURCES
    assert back_end.call(m.RemMemReg(region(0))) == 0
    assert back_end.call(m.AddMemReg(region(2 << 30)), 1) == 0


def test_a_table_has_no_more_regions_than_slots() -> None:
    back_end = BackEnd(limits=ConnectionLimits(mem_slots=2)).negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    three = m.SetMemTable(tuple(region(i << 30) for i in range(1, 4)))
    assert back_end.call(three, 3) == NtStatus.INSUFFICIENT_RESOURCES
    assert back_end.session.table.regions == (region(0),)
    two = m.SetMemTable(three.regions[:2])
    assert back_end.call(two, 2) == 0
    assert back_end.session.table.regions == two.regions


def test_a_table_that_the_back_end_refuses_is_not_entered() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    table = m.SetMemTable((region(1 << 30), region(0)))
    assert back_end.call(table, 2, NtStatus.NO_MEMORY) == NtStatus.NO_MEMORY
    assert back_end.session.table.regions == (region(0),)


def test_memory_table() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    table = tuple(region(i << 30) for i in range(1, 9))
    assert back_end.call(m.SetMemTable(table), 8) == 0
    assert back_end.call(m.RemMemReg(region(0))) == NtStatus.INVALID_PARAMETER
    assert back_end.call(m.RemMemReg(region(8 << 30))) == 0
    overlapping = (region(0), region(0x8_0000))
    assert back_end.call(m.SetMemTable(overlapping), 2) == NtStatus.CONFLICTING_ADDRESSES
    assert back_end.call(m.SetMemTable(())) == 0
    assert back_end.session.table.regions == ()


def test_opening_before_there_is_memory() -> None:
    back_end = BackEnd().negotiate()
    opening = m.Open(Opening(0, 1, 2))
    event = back_end.event(opening, 2)
    assert isinstance(event, Refused)
    assert len(event.fds) == 2
    assert back_end.status() == NtStatus.INVALID_DEVICE_STATE
    assert back_end.call(m.AddMemReg(region(0)), 1) == 0
    assert back_end.call(opening, 2) == 0
    assert back_end.call(m.RemMemReg(region(0))) == 0
    assert back_end.call(opening, 2) == NtStatus.INVALID_DEVICE_STATE


def test_long_gpadl_list_and_big_code_map() -> None:
    back_end = BackEnd().negotiate()
    assert back_end.call(m.GpadlCreate(0, 1, 1, 4 << 20), 1) == 0
    too_long = m.GpadlCreate(0, 1, 1, (4 << 20) + 8)
    assert back_end.call(too_long, 1) == NtStatus.INSUFFICIENT_RESOURCES
    assert back_end.call(m.SetCodeMap(1 << 30, ()), 1) == 0
    too_big = m.SetCodeMap((1 << 30) + 1, ())
    assert back_end.call(too_big, 1) == NtStatus.INSUFFICIENT_RESOURCES
