# SPDX-License-Identifier: GPL-2.0-or-later
"""The server on real sockets, with a back end that only writes down what it is asked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

import pytest

from vhostvmbus.device.offers import ChannelOffers
from vhostvmbus.guest.front_end import FrontEnd
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backend import Invalidate
from vhostvmbus.vhost_user.codec import NEED_REPLY, encode
from vhostvmbus.vhost_user.errors import (
    BackChannelTimeout,
    Disconnected,
    NotASocket,
    Oversized,
    RequestRefused,
    SocketInUse,
    Truncated,
    UnexpectedReply,
    WrongFds,
    WrongFdType,
    WrongSize,
)
from vhostvmbus.vhost_user.gpadl import SEALS, write_list
from vhostvmbus.vhost_user.server import Server, serve
from vhostvmbus.vhost_user.sockets import bind_listener
from vhostvmbus.wire.errors import FrontEndError, GpadlUnknown, RegionBusy
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.ntstatus import NtStatus

OFFER = m.OfferReply(
    UUID("ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"), UUID(int=0), 0, 0, 1, 2, bytes(120)
)
FEATURES = m.REQUIRED_FEATURES | m.ProtocolFeature.VMBUS_CODE_MAP
CHANNEL_ARGS = (2, 0, 0x50003, bytes(120))


class Recorder:
    """A back end that writes down its calls; `refuse` names the calls to refuse."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refuse: dict[str, FrontEndError] = {}
        self.open_status = NtStatus.SUCCESS
        self.invalidate: Invalidate | None = None
        self.offers = ChannelOffers(1, 2)
        self.disconnected = threading.Semaphore(0)
        self.fds: list[int] = []

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        error = self.refuse.get(str(call[0]))
        if error is not None:
            raise error

    def offer(self) -> m.OfferReply:
        return OFFER

    def connected(self) -> None:
        assert self.offers.offer_channel is not None
        assert self.offers.rescind_channel is not None

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> object:
        os.fstat(fd)
        self._note("add", guest_phys_addr, size, mmap_offset)
        return None

    def remove_region(self, guest_phys_addr: int, size: int) -> None:
        self._note("remove", guest_phys_addr, size)

    def gpadl_create(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> None:
        shown = [(r.byte_count, r.byte_offset, list(r.pfns)) for r in ranges]
        self._note("gpadl", channel, gpadl_id, shown)

    def gpadl_teardown(self, channel: int, gpadl_id: int) -> None:
        self._note("teardown", channel, gpadl_id)

    def open_channel(
        self,
        index: int,
        gpadl_id: int,
        ring_offset: int,
        target_vp: int,
        version: int,
        user_data: bytes,
        kick_fd: int,
        call_fd: int,
        resume: bool = False,
    ) -> NtStatus:
        os.eventfd_write(call_fd, os.eventfd_read(kick_fd) + 1)
        self._note("open", index, gpadl_id, ring_offset, target_vp, version, user_data, resume)
        return self.open_status

    def close_channel(self, index: int) -> None:
        self._note("close", index)

    def modify_channel(self, index: int, target_vp: int) -> None:
        self._note("modify", index, target_vp)

    def set_code_map(
        self, fd: int, map_bytes: int, regions: Sequence[tuple[int, int, int]]
    ) -> None:
        self._note("code map", map_bytes, list(regions))

    def reset(self) -> None:
        self._note("reset")

    def disconnect(self) -> None:
        self.calls.append(("disconnect",))
        self.disconnected.release()


class Running:
    """A server in a thread, with what is needed to look at it."""

    def __init__(self, path: Path, listen: bool, answer_timeout: float) -> None:
        self.path = path
        self.back_end = Recorder()
        self.server = Server(self.back_end, path, listen=listen, answer_timeout=answer_timeout)
        self.failure: BaseException | None = None
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self.server.run(self.ready.set)
        except BaseException as error:
            self.failure = error
            self.ready.set()

    def raw(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10)
        sock.connect(str(self.path))
        return sock

    @contextlib.contextmanager
    def front_end(self, status: int = 0, negotiate: bool = True) -> Iterator[FrontEnd]:
        self.invalidated: list[m.Message] = []

        def handler(message: m.Message) -> int:
            self.invalidated.append(message)
            return status

        front_end = FrontEnd(self.raw(), FEATURES, handler)
        try:
            if negotiate:
                assert front_end.negotiate() == OFFER
            yield front_end
        finally:
            front_end.close()

    def wait_for_disconnect(self) -> None:
        assert self.back_end.disconnected.acquire(timeout=10)

    def last_error(self) -> FrontEndError | None:
        """The error of the connection that has just ended."""
        deadline = time.monotonic() + 10
        while self.server.last_error is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.server.last_error


@contextlib.contextmanager
def running(path: Path, listen: bool = True, answer_timeout: float = 10.0) -> Iterator[Running]:
    run = Running(path, listen, answer_timeout)
    run.thread.start()
    try:
        assert run.ready.wait(10)
        yield run
    finally:
        run.server.stop()
        run.thread.join(10)
        assert not run.thread.is_alive()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "sock") as run:
        yield run


@pytest.fixture(autouse=True)
def _no_descriptor_stays_open() -> Iterator[None]:
    before = open_fds()
    yield
    deadline = time.monotonic() + 5
    while open_fds() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_fds() == before


def open_fds() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):
                found[name] = target
    return found


@contextlib.contextmanager
def memfd(size: int = 4096, seals: int = 0) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def eventfds() -> Iterator[tuple[int, int]]:
    pair = os.eventfd(1, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    try:
        yield pair
    finally:
        for fd in pair:
            os.close(fd)


def region(start: int, size: int = 4096, offset: int = 0) -> m.MemoryRegion:
    return m.MemoryRegion(start, size, start + 0x7000, offset)


def status_of(front_end: FrontEnd, message: m.Message, fds: Sequence[int] = ()) -> int:
    with pytest.raises(RequestRefused) as caught:
        front_end.request(message, fds)
    return caught.value.status


def assert_closed(sock: socket.socket) -> None:
    """The server has closed the connection, with bytes of ours unread or without."""
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(100) == b""


# ---- what the back end is told ----------------------------------------------------------


def test_every_request_reaches_the_back_end(run: Running) -> None:
    gpadl, size = write_list([GpaRange(8192, 0, [3, 4]), GpaRange(100, 4000, [9, 2])])
    user_data = bytes(range(120))
    with run.front_end() as front_end, memfd() as fd, eventfds() as (kick, call):
        front_end.request(m.AddMemReg(region(0x1000, 4096, 8192)), [fd])
        front_end.request(m.SetCodeMap(8, (m.CodeMapRegion(0x1000, 4096, 3),)), [fd])
        front_end.request(m.GpadlCreate(0, 0xE1E10, 2, size), [gpadl])
        front_end.request(m.Open(0, 0xE1E10, 2, 1, 0x50003, 1, user_data), [kick, call])
        assert os.eventfd_read(call) == 2
        front_end.request(m.Modify(0, 3))
        front_end.request(m.Close(0))
        front_end.request(m.GpadlTeardown(0, 0xE1E10))
        front_end.request(m.Reset())
        front_end.request(m.RemMemReg(region(0x1000)))
    os.close(gpadl)
    run.wait_for_disconnect()
    assert run.back_end.calls == [
        ("add", 0x1000, 4096, 8192),
        ("code map", 8, [(0x1000, 4096, 3)]),
        ("gpadl", 0, 0xE1E10, [(8192, 0, [3, 4]), (100, 4000, [9, 2])]),
        ("open", 0, 0xE1E10, 2, 1, 0x50003, user_data, True),
        ("modify", 0, 3),
        ("close", 0),
        ("teardown", 0, 0xE1E10),
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
        back_end.open_status = NtStatus.ACCESS_DENIED
        opening = m.Open(0, 1, 2, 0, 0, 0, bytes(120))
        assert status_of(front_end, opening, events) == NtStatus.ACCESS_DENIED
        front_end.request(m.Reset())
    run.wait_for_disconnect()


def test_a_bug_in_the_back_end_is_a_status(run: Running) -> None:
    with run.front_end() as front_end, memfd(16) as fd:
        run.back_end.refuse["reset"] = OSError(5, "disk on fire")  # type: ignore[assignment]
        assert status_of(front_end, m.Reset()) == NtStatus.UNSUCCESSFUL
        assert status_of(front_end, m.SetCodeMap(17, ()), [fd]) == NtStatus.INVALID_PARAMETER
        front_end.request(m.SetCodeMap(16, ()), [fd])


def test_a_busy_region_has_left_the_table_all_the_same(run: Running) -> None:
    with run.front_end() as front_end, memfd() as fd:
        front_end.request(m.AddMemReg(region(0)), [fd])
        run.back_end.refuse["remove"] = RegionBusy("packets refer to it")
        assert status_of(front_end, m.RemMemReg(region(0))) == NtStatus.IO_TIMEOUT
        run.back_end.refuse.clear()
        front_end.request(m.AddMemReg(region(0)), [fd])
        front_end.request(m.RemMemReg(region(0)))


def test_memory_table_keeps_what_stays(run: Running) -> None:
    back_end = run.back_end
    with run.front_end() as front_end, memfd() as one, memfd() as two:
        front_end.request(m.AddMemReg(region(0)), [one])
        front_end.request(m.SetMemTable((region(0), region(0x1000))), [one, two])
        assert back_end.calls == [("add", 0, 4096, 0), ("add", 0x1000, 4096, 0)]
        back_end.calls.clear()
        # the same addresses with another file, and another offset
        front_end.request(m.SetMemTable((region(0), region(0x1000, 4096, 4096))), [two, two])
        assert back_end.calls == [
            ("remove", 0, 4096),
            ("remove", 0x1000, 4096),
            ("add", 0, 4096, 0),
            ("add", 0x1000, 4096, 4096),
        ]
        back_end.calls.clear()
        # a failure half-way leaves what was done
        back_end.refuse["add"] = FrontEndError("no", NtStatus.NO_MEMORY)
        table = m.SetMemTable((region(0), region(0x5000)))
        assert status_of(front_end, table, [two, one]) == NtStatus.NO_MEMORY
        back_end.refuse.clear()
        assert status_of(front_end, m.RemMemReg(region(0x5000))) == NtStatus.INVALID_PARAMETER
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


# ---- front ends that break the protocol -------------------------------------------------


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (struct.pack("<III", 1, 1, 5000), Oversized),
        (struct.pack("<III", 1, 1, 1), WrongSize),
        (encode(m.GetFeatures())[:7], Truncated),
        (encode(m.SetFeatures(0))[:15], Truncated),
    ],
)
def test_broken_session_then_a_good_one(run: Running, data: bytes, error: type[Exception]) -> None:
    with run.raw() as sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        assert_closed(sock)
    assert type(run.last_error()) is error
    with run.front_end() as front_end:
        front_end.request(m.Reset())
    assert run.server.protocol_errors == 1


def test_descriptors_of_a_broken_message_are_closed(run: Running) -> None:
    with run.raw() as sock, memfd() as fd:
        socket.send_fds(sock, [encode(m.GetFeatures())], [fd, fd, fd])
        assert_closed(sock)
    assert isinstance(run.last_error(), WrongFds)


def test_too_many_descriptors(run: Running) -> None:
    with run.raw() as sock, memfd() as fd:
        socket.send_fds(sock, [encode(m.SetMemTable(()))], [fd] * 100)
        assert_closed(sock)
    assert isinstance(run.last_error(), WrongFds)


def test_truncated_with_descriptors(run: Running) -> None:
    with run.front_end() as front_end, memfd() as fd:
        front_end.send_raw(encode(m.AddMemReg(region(0)), flags=NEED_REPLY)[:-1], [fd])
    assert isinstance(run.last_error(), Truncated)


def test_message_in_single_bytes(run: Running) -> None:
    with run.front_end() as front_end, memfd() as fd:
        data = encode(m.AddMemReg(region(0)), flags=NEED_REPLY)
        front_end.send_raw(data[:1], [fd])
        for at in range(1, len(data)):
            front_end.send_raw(data[at : at + 1])
        assert front_end.receive_raw()[-8:] == bytes(8)
    run.wait_for_disconnect()
    assert run.back_end.calls == [("add", 0, 4096, 0), ("disconnect",)]


def test_two_messages_in_one_write(run: Running) -> None:
    with run.front_end() as front_end:
        message = encode(m.Reset(), flags=NEED_REPLY)
        front_end.send_raw(message * 2)
        answer = b""
        while len(answer) < 40:
            answer += front_end.receive_raw()
        assert len(answer) == 40
    run.wait_for_disconnect()
    assert run.back_end.calls == [("reset",), ("reset",), ("disconnect",)]


@pytest.mark.parametrize("position", [0, 1])
def test_kick_and_call_have_to_be_eventfds(run: Running, position: int) -> None:
    with run.front_end() as front_end, memfd() as fd, eventfds() as events:
        front_end.request(m.AddMemReg(region(0)), [fd])
        fds = list(events)
        fds[position] = fd
        with pytest.raises(Disconnected):
            front_end.request(m.Open(0, 1, 2, 0, 0, 0, bytes(120)), fds)
    error = run.last_error()
    assert isinstance(error, WrongFdType)
    assert error.field == ("kick", "call")[position]


def test_back_end_channel_has_to_be_a_stream_socket(run: Running) -> None:
    for fd in (os.eventfd(0), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()):
        with run.front_end(negotiate=False) as front_end:
            for message in (
                m.GetFeatures(),
                m.GetProtocolFeatures(),
                m.SetProtocolFeatures(int(FEATURES)),
                m.SetFeatures(m.F_PROTOCOL_FEATURES),
                m.SetOwner(),
            ):
                front_end.request(message)
            with pytest.raises(Disconnected):
                front_end.request(m.SetBackendReqFd(), [fd])
        assert isinstance(run.last_error(), WrongFdType)
        os.close(fd)


def test_random_bytes_do_not_stop_the_server(run: Running) -> None:
    chance = random.Random(7)
    with memfd() as fd:
        for _ in range(50):
            with run.raw() as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                header = struct.pack(
                    "<III", chance.choice([1, 5, 37, 1027]), 1, chance.randrange(200)
                )
                data = header + chance.randbytes(chance.randrange(200))
                socket.send_fds(sock, [data], [fd] * chance.randrange(9))
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
    with run.front_end() as front_end:
        front_end.request(m.Reset())
    assert run.server.connections == 51


# ---- the back-end channel ---------------------------------------------------------------


def invalidator(run: Running) -> Invalidate:
    assert run.back_end.invalidate is not None
    return run.back_end.invalidate


def test_invalidate(run: Running) -> None:
    with run.front_end():
        invalidator(run)([(0x1000, 0x2000)])
        assert run.invalidated == [m.InvalidateCode(((0x1000, 0x2000),))]
        run.invalidated.clear()
        ranges = [(page << 12, 4096) for page in range(450)]
        invalidator(run)(ranges)
        parts = [
            message.ranges for message in run.invalidated if isinstance(message, m.InvalidateCode)
        ]
        assert [len(part) for part in parts] == [200, 200, 50]
        assert [item for part in parts for item in part] == ranges
    run.wait_for_disconnect()


def test_invalidate_from_many_threads(run: Running) -> None:
    with run.front_end():
        threads = [
            threading.Thread(target=invalidator(run), args=([(page << 12, 4096)],))
            for page in range(20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        seen = {
            message.ranges[0][0] >> 12
            for message in run.invalidated
            if isinstance(message, m.InvalidateCode)
        }
        assert seen == set(range(20))


def test_invalidate_while_a_request_is_carried_out(run: Running) -> None:
    """A close waits for a packet that waits for the invalidation."""

    def close_channel(index: int) -> None:
        worker = threading.Thread(target=invalidator(run), args=([(0, 4096)],))
        worker.start()
        worker.join(10)
        assert not worker.is_alive()

    run.back_end.close_channel = close_channel  # type: ignore[method-assign]
    with run.front_end() as front_end:
        front_end.request(m.Close(0))
        assert len(run.invalidated) == 1


def test_refused_invalidation(run: Running) -> None:
    with run.front_end(status=NtStatus.NOT_SUPPORTED) as front_end:
        with pytest.raises(RequestRefused) as caught:
            invalidator(run)([(0, 4096)])
        assert caught.value.status == NtStatus.NOT_SUPPORTED
        front_end.request(m.Reset())


def test_invalidation_without_an_answer_ends_the_session(tmp_path: Path) -> None:
    with running(tmp_path / "sock", answer_timeout=0.1) as run:
        release = threading.Event()
        with run.front_end() as front_end:
            front_end._handler = lambda _: int(not release.wait(10))
            invalidate = invalidator(run)
            with pytest.raises(BackChannelTimeout):
                invalidate([(0, 4096)])
            with pytest.raises(Disconnected):
                invalidate([(0, 4096)])
            run.wait_for_disconnect()
            release.set()
        with run.front_end() as front_end:
            front_end.request(m.Reset())


def test_front_end_leaves_while_an_invalidation_waits(run: Running) -> None:
    failures: list[Exception] = []
    asked, release = threading.Event(), threading.Event()

    def worker() -> None:
        try:
            invalidator(run)([(0, 4096)])
        except Exception as error:
            failures.append(error)

    with run.front_end() as front_end:

        def handler(_: m.Message) -> int:
            asked.set()
            release.wait(10)
            return 0

        front_end._handler = handler
        thread = threading.Thread(target=worker)
        thread.start()
        forget = run.back_end.disconnect

        def disconnect() -> None:
            # As a device host does: it waits for the worker, which waits for the front end.
            thread.join(10)
            assert not thread.is_alive()
            forget()

        run.back_end.disconnect = disconnect  # type: ignore[method-assign]
        assert asked.wait(10)
        front_end._sock.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()
        release.set()
    assert [type(failure) for failure in failures] == [Disconnected]
    run.wait_for_disconnect()
    assert run.back_end.invalidate is None


def test_answer_to_another_back_end_request(run: Running) -> None:
    with run.front_end() as front_end:
        invalidate = invalidator(run)
        # An answer that nobody asked for is the first thing that the next request reads.
        front_end._mine.sendall(encode(m.Value(0), request=1025, flags=4))
        with pytest.raises(UnexpectedReply):
            invalidate([(0, 4096)])
        run.wait_for_disconnect()


# ---- the socket's life ------------------------------------------------------------------


def test_connections_one_after_the_other(run: Running) -> None:
    for _ in range(5):
        with run.front_end() as front_end:
            front_end.request(m.Reset())
        run.wait_for_disconnect()
    assert run.server.connections == 5


def test_the_second_front_end_waits_for_the_first_to_leave(run: Running) -> None:
    with run.front_end(), run.raw() as second:
        second.sendall(encode(m.GetFeatures()))
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first_gone = second.dup()
        first_gone.settimeout(10)
    assert len(first_gone.recv(100)) == 20
    first_gone.close()


def test_socket_file_is_removed_at_the_end(tmp_path: Path) -> None:
    with running(tmp_path / "sock") as run:
        assert run.path.is_socket()
    assert not run.path.exists()


def test_stop_with_a_front_end_connected(tmp_path: Path) -> None:
    with running(tmp_path / "sock") as run, run.front_end():
        run.server.stop()
        run.wait_for_disconnect()
        run.thread.join(10)
        assert not run.thread.is_alive()
    run.server.stop()  # once more does no harm


def test_live_socket_is_not_stolen(run: Running) -> None:
    second = Server(Recorder(), run.path)
    with pytest.raises(SocketInUse, match="listens on"):
        second.run()
    with run.front_end() as front_end:
        front_end.request(m.Reset())
    assert run.path.is_socket()


def test_live_socket_with_a_full_queue_is_not_stolen(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(3):
            client = waiting.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(SocketInUse):
            Server(Recorder(), path).run()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with running(path) as run, run.front_end() as front_end:
        front_end.request(m.Reset())
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NotASocket):
        Server(Recorder(), path).run()
    assert os.path.lexists(path)


def test_somebody_elses_socket_is_left_alone_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with bind_listener(path):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Server(Recorder(), tmp_path / "no" / "sock").run()


def test_connecting_server_waits_reconnects_and_stops(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with running(path, listen=False) as run:
        for attempt in range(2):
            with bind_listener(path) as listener:
                listener.settimeout(10)
                sock, _ = listener.accept()
                front_end = FrontEnd(sock, FEATURES, lambda _: 0)
                assert front_end.negotiate() == OFFER
                front_end.request(m.Reset())
                front_end.close()
            run.wait_for_disconnect()
            assert run.server.connections >= attempt + 1
    assert run.failure is None


def test_serve_with_an_event(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    ready, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=serve, args=(Recorder(), path, True, ready.set, stop))
    thread.start()
    assert ready.wait(10)
    assert path.is_socket()
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert not path.exists()


def test_serve_returns_although_the_event_is_never_set(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    path.write_text("")
    with pytest.raises(NotASocket):
        serve(Recorder(), path, stop_event=threading.Event())
    assert not [t for t in threading.enumerate() if t.name == "stop-watcher"]
