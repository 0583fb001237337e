# SPDX-License-Identifier: GPL-2.0-or-later
"""The server on real sockets: what its back end is told, and what the front end is answered."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

import pytest

from tests.support.vhost_user_server import Running, eventfds, memfd, region, status_of
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.gpadl import SEALS, write_list
from vhostvmbus.wire.errors import FrontEndError, GpadlUnknown, RefuseOpen, RegionBusy
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import SharedRegion

# ---- what the back end is told ----------------------------------------------------------


def test_every_request_reaches_the_back_end(run: Running) -> None:
    gpadl, size = write_list([GpaRange(8192, 0, [3, 4]), GpaRange(100, 4000, [9, 2])])
    opening = Opening(0, 0xE1E10, 2, 1, 0x50003, bytes(range(120)), True)
    with run.front_end() as front_end, memfd() as fd, eventfds() as (kick, call):
        front_end.request(m.AddMemReg(region(0x1000, 4096, 8192)), [fd])
        front_end.request(m.SetCodeMap(8, (m.CodeMapRegion(0x1000, 4096, 3),)), [fd])
        front_end.request(m.GpadlCreate(0, 0xE1E10, 2, size), [gpadl])
        front_end.request(m.Open(opening), [kick, call])
        assert os.eventfd_read(call) == 2
        front_end.request(m.Modify(0, 3))
        front_end.request(m.Close(0))
        front_end.request(m.GpadlTeardown(0, 0xE1E10))
        front_end.request(m.Unplug())
        front_end.request(m.Reset())
        front_end.request(m.RemMemReg(region(0x1000)))
    os.close(gpadl)
    run.wait_for_disconnect()
    assert run.back_end.calls == [
        ("add", 0x1000, 4096, 8192),
        ("code map", 8, [(0x1000, 4096, 3)]),
        ("gpadl", 0, 0xE1E10, [(8192, 0, [3, 4]), (100, 4000, [9, 2])]),
        ("open", opening),
        ("modify", 0, 3),
        ("close", 0),
        ("teardown", 0, 0xE1E10),
        ("unplug",),
        ("reset",),
        ("remove", 0x1000, 4096),
        ("disconnect",),
    ]
    assert run.server.protocol_errors == 0


def test_refusals_reach_the_front_end_and_the_session_goes_on(run: Running) -> None:
    back_end = run.back_end
    with run.front_end() as front_end, memfd() as fd, eventfds() as events:
        back_end.refuse["add"] = FrontEndError("no", NtStatus.NO_MEMORY)
        assert status_of(front_end, m.AddMemReg(region(0)), [fd]) == NtStatus.NO_MEMORY
        back_end.refuse.clear()
        front_end.request(m.AddMemReg(region(0)), [fd])
        back_end.refuse["teardown"] = GpadlUnknown("no such GPADL")
        assert status_of(front_end, m.GpadlTeardown(0, 1)) == NtStatus.INVALID_HANDLE
        back_end.refuse["open"] = RefuseOpen(NtStatus.ACCESS_DENIED)
        opening = m.Open(Opening(0, 1, 2))
        assert status_of(front_end, opening, events) == NtStatus.ACCESS_DENIED
        front_end.request(m.Reset())
    run.wait_for_disconnect()


def test_a_bug_in_the_back_end_is_a_status(run: Running) -> None:
    with run.front_end() as front_end, memfd(16) as fd:
        run.back_end.refuse["reset"] = OSError(5, "disk on fire")
        assert status_of(front_end, m.Reset()) == NtStatus.UNSUCCESSFUL
        front_end.request(m.SetCodeMap(16, ()), [fd])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("add", m.AddMemReg(region(0x1000))),
        ("remove", m.RemMemReg(region(0))),
        ("table", m.SetMemTable((region(0x1000),))),
    ],
)
def test_what_the_back_end_refuses_leaves_the_table_as_it_was(
    run: Running, call: str, message: m.Message
) -> None:
    with run.front_end() as front_end, memfd() as fd:
        front_end.request(m.AddMemReg(region(0)), [fd])
        run.back_end.refuse[call] = RegionBusy("packets refer to it")
        fds = [] if call == "remove" else [fd]
        assert status_of(front_end, message, fds) == NtStatus.IO_TIMEOUT
        run.back_end.refuse.clear()
        # The session still has the region of before, and no other.
        overlapping = m.AddMemReg(region(0))
        assert status_of(front_end, overlapping, [fd]) == NtStatus.CONFLICTING_ADDRESSES
        unknown = m.RemMemReg(region(0x1000))
        assert status_of(front_end, unknown) == NtStatus.INVALID_PARAMETER
        front_end.request(m.RemMemReg(region(0)))


def test_a_memory_table_reaches_the_back_end_as_a_whole(run: Running) -> None:
    with run.front_end() as front_end, memfd() as one, memfd() as two:
        front_end.request(m.AddMemReg(region(0)), [one])
        run.back_end.calls.clear()
        table = m.SetMemTable((region(0), region(0x1000, 4096, 8192)))
        front_end.request(table, [one, two])
        first, second = (os.fstat(fd).st_ino for fd in (one, two))
        assert run.back_end.calls == [
            ("table", SharedRegion(0, 4096, first, 0), SharedRegion(0x1000, 4096, second, 8192))
        ]
        front_end.request(m.RemMemReg(region(0x1000)))
        front_end.request(m.RemMemReg(region(0)))


# ---- GPADL lists ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seals", [0, *(SEALS & ~seal for seal in (fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, 8))]
)
def test_unsealed_gpadl_list(run: Running, seals: int) -> None:
    assert fcntl.F_SEAL_WRITE == 8
    with run.front_end() as front_end, memfd(0) as fd:
        os.write(fd, struct.pack("<IIQ", 4096, 0, 5))
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        status = status_of(front_end, m.GpadlCreate(0, 1, 1, 16), [fd])
        assert status == NtStatus.INVALID_PARAMETER
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        front_end.request(m.GpadlCreate(0, 1, 1, 16), [fd])


def test_gpadl_list_that_is_no_memfd(run: Running, tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    with run.front_end() as front_end:
        status = status_of(front_end, m.GpadlCreate(0, 1, 1, 16), [fd])
        assert status == NtStatus.INVALID_PARAMETER
    os.close(fd)


LISTS = {
    "empty range": (1, struct.pack("<IIQ", 0, 0, 5)),
    "more PFNs than bytes": (1, struct.pack("<IIQ", 8192, 0, 5)),
    "fewer PFNs than bytes": (1, struct.pack("<IIQQ", 4096, 0, 5, 6)),
    "second range cut off": (2, struct.pack("<IIQQIIQ", 8192, 0, 5, 6, 8192, 0, 7)),
    "huge count": (1, struct.pack("<IIQ", 0xFFFFFFFF, 0, 5)),
    "huge offset": (1, struct.pack("<IIQ", 1, 0xFFFFFFFF, 5)),
}


@pytest.mark.parametrize("name", LISTS)
def test_malformed_gpadl_list(run: Running, name: str) -> None:
    count, data = LISTS[name]
    with run.front_end() as front_end, memfd(0) as fd:
        os.write(fd, data)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        message = m.GpadlCreate(0, 1, count, len(data))
        assert status_of(front_end, message, [fd]) == NtStatus.INVALID_PARAMETER
    assert not [call for call in run.back_end.calls if call[0] == "gpadl"]


def test_gpadl_list_longer_than_its_memfd(run: Running) -> None:
    fd, size = write_list([GpaRange(4096, 0, [1])])
    with run.front_end() as front_end:
        status = status_of(front_end, m.GpadlCreate(0, 1, 1, size + 8), [fd])
        assert status == NtStatus.INVALID_PARAMETER
    os.close(fd)
