# SPDX-License-Identifier: GPL-2.0-or-later
"""The server and front ends that break the protocol: the session ends, the server goes on."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import socket
import struct
from pathlib import Path

import pytest

from tests.support.vhost_user_server import Running, assert_closed, eventfds, memfd, region
from tests.support.vhost_user_session import FEATURES
from tests.support.waiting import eventually
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import NEED_REPLY, encode
from vhostvmbus.vhost_user.errors import (
    Disconnected,
    Oversized,
    Truncated,
    WrongFds,
    WrongFdType,
    WrongSize,
)
from vhostvmbus.vhost_user.sockets import require_eventfd
from vhostvmbus.wire.opening import Opening


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
            front_end.request(m.Open(Opening(0, 1, 2)), fds)
    error = run.last_error()
    assert isinstance(error, WrongFdType)
    assert error.field == ("kick", "call")[position]


def test_what_is_an_eventfd_and_what_is_not(tmp_path: Path) -> None:
    with memfd() as file, eventfds() as (kick, call):
        require_eventfd(kick, "kick")
        require_eventfd(call, "call")
        named = os.open(tmp_path / "anon_inode:[eventfd]", os.O_CREAT | os.O_RDWR)
        ends = os.pipe()
        for fd in (file, named, *ends):
            with pytest.raises(WrongFdType, match="kick"):
                require_eventfd(fd, "kick")
        for fd in (named, *ends):
            os.close(fd)
        with pytest.raises(OSError, match="No such file"):
            require_eventfd(named, "kick")


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


def test_an_exception_that_nobody_expected_ends_one_session(run: Running) -> None:
    run.back_end.refuse["reset"] = KeyError("whatever")
    with run.front_end() as front_end, pytest.raises(Disconnected):
        front_end.request(m.Reset())
    del run.back_end.refuse["reset"]
    with run.front_end() as front_end:
        front_end.request(m.Reset())
    assert (run.server.failures, run.server.protocol_errors) == (1, 0)


def test_a_front_end_that_comes_when_descriptors_have_run_out(
    run: Running, caplog: pytest.LogCaptureFixture
) -> None:
    """It is let in when there are some again."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        free = os.dup(0)  # the lowest that there is
        os.close(free)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
        try:
            sock.connect(str(run.path))
            eventually(lambda: "cannot be let in" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        sock.sendall(encode(m.GetFeatures()))
        assert len(sock.recv(20)) == 20
