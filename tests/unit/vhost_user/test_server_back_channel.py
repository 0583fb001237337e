# SPDX-License-Identifier: GPL-2.0-or-later
"""The back-end channel on real sockets: invalidations, while requests are carried out as well."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.support.vhost_user_server import Running, running
from tests.support.waiting import in_thread, open_fds, together
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.backchannel import BackChannel
from vhostvmbus.vhost_user.backend import Invalidate
from vhostvmbus.vhost_user.codec import encode
from vhostvmbus.vhost_user.errors import (
    BackChannelTimeout,
    Disconnected,
    RequestRefused,
    UnexpectedReply,
    WrongFdType,
)
from vhostvmbus.vhost_user.sockets import require_stream_socket
from vhostvmbus.wire.ntstatus import NtStatus


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
        together(*(partial(invalidator(run), [(page << 12, 4096)]) for page in range(20)))
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


def test_a_front_end_that_does_not_read_is_given_up() -> None:
    """It has the open file as well: its queue is full, and it may block or not as it likes."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                ours.send(bytes(4096))
        channel = BackChannel(require_stream_socket(ours.fileno(), "back end"), timeout=0.05)
        ours.setblocking(True)
        thread, outcome = in_thread(lambda: channel.invalidate([(0, 4096)]))
        thread.join(10)
        assert [type(error) for error in outcome] == [BackChannelTimeout]
        channel.close()


@pytest.mark.parametrize("dead", [False, True])
def test_sockets_of_odd_kinds_are_refused_and_not_kept(dead: bool) -> None:
    """Of a family without a name, or one that cannot even be asked for its address."""
    family, kind, protocol = (socket.AF_INET, 10, 768) if dead else (44, socket.SOCK_RAW, 0)
    with contextlib.closing(socket.socket(family, kind, protocol)) as odd:
        before = open_fds()
        with pytest.raises(WrongFdType):
            require_stream_socket(odd.fileno(), "back end")
        assert open_fds() == before


def test_a_back_channel_that_fails_does_not_say_that_the_back_end_is_done(run: Running) -> None:
    """The front end takes the connection's end as the end of every use of its memory."""
    seen: list[bool] = []
    with run.front_end() as front_end:
        real = run.back_end.disconnect

        def disconnect() -> None:
            seen.append(bool(select.select([front_end._sock], [], [], 0)[0]))
            real()

        run.back_end.disconnect = disconnect  # type: ignore[method-assign]
        front_end._mine.shutdown(socket.SHUT_RDWR)
        with pytest.raises(Disconnected):
            invalidator(run)([(0, 4096)])
        run.wait_for_disconnect()
        assert front_end.receive_raw() == b""
    assert seen == [False]
