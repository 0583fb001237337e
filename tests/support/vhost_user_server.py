# SPDX-License-Identifier: GPL-2.0-or-later
"""A vhost-user server in a thread, and a back end that only writes down what it is asked.

Descriptors and regions for requests are here as well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.vhost_user_session import FEATURES, OFFER
from vhostvmbus.device.offers import ChannelOffers
from vhostvmbus.guest.front_end import FrontEnd
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backend import Invalidate
from vhostvmbus.vhost_user.errors import RequestRefused
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vhost_user.server import Server
from vhostvmbus.wire.errors import FrontEndError
from vhostvmbus.wire.gpa import GpaRange
from vhostvmbus.wire.offer import Offer
from vhostvmbus.wire.opening import Opening
from vhostvmbus.wire.regions import SharedRegion


class Recorder:
    """A back end that writes down its calls; ``refuse`` names the calls to refuse."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []
        self.refuse: dict[str, Exception] = {}
        self.invalidate: Invalidate | None = None
        self.offers = ChannelOffers(1, 2)
        self.disconnected = threading.Semaphore(0)
        self.fds: list[int] = []

    def calls_of(self, name: str) -> list[tuple[object, ...]]:
        """Returns the calls so far that were written down as ``name``."""
        return [call for call in self.calls if call[0] == name]

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        error = self.refuse.get(str(call[0]))
        if error is not None:
            raise error

    def offer(self) -> Offer:
        return OFFER.offer

    def connected(self) -> None:
        assert self.offers.offer_channel is not None
        assert self.offers.rescind_channel is not None

    def add_region(self, guest_phys_addr: int, size: int, fd: int, mmap_offset: int = 0) -> object:
        os.fstat(fd)
        self._note("add", guest_phys_addr, size, mmap_offset)
        return None

    def remove_region(self, guest_phys_addr: int, size: int) -> None:
        self._note("remove", guest_phys_addr, size)

    def set_memory_table(self, table: Sequence[SharedRegion]) -> None:
        self._note("table", *(item._replace(fd=os.fstat(item.fd).st_ino) for item in table))

    def gpadl_create(self, channel: int, gpadl_id: int, ranges: Sequence[GpaRange]) -> None:
        shown = [(r.byte_count, r.byte_offset, list(r.pfns)) for r in ranges]
        self._note("gpadl", channel, gpadl_id, shown)

    def gpadl_teardown(self, channel: int, gpadl_id: int) -> None:
        self._note("teardown", channel, gpadl_id)

    def open_channel(self, opening: Opening, kick_fd: int, call_fd: int) -> None:
        os.eventfd_write(call_fd, os.eventfd_read(kick_fd) + 1)
        self._note("open", opening)

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

    def suspend(self) -> None:
        self._note("suspend")

    def go_on(self) -> None:
        self._note("go on")

    def unplug(self) -> None:
        self._note("unplug")

    def disconnect(self) -> None:
        self.calls.append(("disconnect",))
        self.disconnected.release()


class Running:
    """A server in a thread, and what is needed to look at it."""

    def __init__(
        self,
        path: Path,
        listen: bool,
        answer_timeout: float,
        limits: ConnectionLimits | None = None,
    ) -> None:
        self.path = path
        self.back_end = Recorder()
        self.server = Server(
            self.back_end, path, listen=listen, limits=limits, answer_timeout=answer_timeout
        )
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
                assert front_end.negotiate() == OFFER.offer
            yield front_end
        finally:
            front_end.close()

    def wait_for_disconnect(self) -> None:
        assert self.back_end.disconnected.acquire(timeout=10)

    def last_error(self) -> FrontEndError | None:
        """Returns the error of the connection that has just ended."""
        deadline = time.monotonic() + 10
        while self.server.last_error is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.server.last_error


@contextlib.contextmanager
def running(
    path: Path,
    listen: bool = True,
    answer_timeout: float = 10.0,
    limits: ConnectionLimits | None = None,
) -> Iterator[Running]:
    run = Running(path, listen, answer_timeout, limits)
    run.thread.start()
    try:
        assert run.ready.wait(10)
        yield run
    finally:
        run.server.stop()
        run.thread.join(10)
        assert not run.thread.is_alive()


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
    """Fails unless the server has closed the connection, with bytes of ours unread or without."""
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(100) == b""
