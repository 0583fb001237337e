# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of the server's socket: one front end after the other, leftovers, both directions of
connecting."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from tests.support.vhost_user_server import Recorder, Running, assert_closed, running
from tests.support.vhost_user_session import FEATURES, OFFER
from tests.support.waiting import eventually, in_thread, together
from vhostvmbus.guest.front_end import FrontEnd
from vhostvmbus.vhost_user import doorkeeper, sockets
from vhostvmbus.vhost_user import messages as m
from vhostvmbus.vhost_user.codec import encode
from vhostvmbus.vhost_user.errors import NotASocket, SocketInUse
from vhostvmbus.vhost_user.server import Server, serve
from vhostvmbus.vhost_user.sockets import bind_listener

NOBODY = 65534


def test_connections_one_after_the_other(run: Running) -> None:
    for _ in range(5):
        with run.front_end() as front_end:
            front_end.request(m.Reset())
        run.wait_for_disconnect()
    assert run.server.connections == 5


def test_a_second_front_end_is_turned_away_at_once(
    run: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with run.front_end() as first:
        for _ in range(3):
            with run.raw() as second:
                with contextlib.suppress(OSError):
                    second.sendall(encode(m.GetFeatures()))
                assert_closed(second)
        first.request(m.Reset())
    pid = os.getpid()
    said = f"another front end, process {pid}, is turned away: that of process {pid} is served"
    assert caplog.messages == [said] * 3
    run.wait_for_disconnect()
    with run.front_end() as second_one:
        second_one.request(m.Reset())
    assert run.server.connections == 2


def test_a_second_front_end_is_turned_away_while_a_request_is_carried_out(run: Running) -> None:
    busy, done = threading.Event(), threading.Event()

    def slow() -> None:
        busy.set()
        assert done.wait(10)

    run.back_end.reset = slow  # type: ignore[method-assign]
    with run.front_end() as first:
        thread, outcome = in_thread(lambda: first.request(m.Reset()))
        assert busy.wait(10)
        with run.raw() as second:
            assert_closed(second)
        done.set()
        thread.join(10)
    assert outcome == [m.Value(0)]


def test_who_comes_while_the_first_one_leaves_is_served(run: Running) -> None:
    leaving, go_on = threading.Event(), threading.Event()
    disconnect = run.back_end.disconnect

    def slow() -> None:
        leaving.set()
        assert go_on.wait(10)
        disconnect()

    run.back_end.disconnect = slow  # type: ignore[method-assign]
    with run.raw():
        eventually(lambda: run.server.connections)
    assert leaving.wait(10)
    with run.raw() as second:
        second.sendall(encode(m.GetFeatures()))
        go_on.set()
        assert len(second.recv(100)) == 20


def test_a_silent_one_makes_room(run: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorkeeper, "HANDSHAKE_PATIENCE", 0.05)
    with run.raw() as silent, run.raw() as half_way:
        half_way.sendall(encode(m.GetFeatures()))
        with run.front_end() as front_end:
            front_end.request(m.Reset())
            assert_closed(silent)
        assert len(half_way.recv(100)) == 20
        assert_closed(half_way)
    assert run.server.connections == 3


def test_a_silent_one_that_nobody_waits_for_may_take_its_time(
    run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorkeeper, "HANDSHAKE_PATIENCE", 0.0)
    with run.front_end(negotiate=False) as front_end:
        eventually(lambda: run.server.connections)
        assert front_end.negotiate() == OFFER.offer
        front_end.request(m.Reset())
    assert run.server.connections == 1


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
    with pytest.raises(FileNotFoundError, match="the folder for a socket") as caught:
        Server(Recorder(), tmp_path / "no" / "sock").run()
    assert caught.value.filename == str(tmp_path / "no")


def test_a_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    path = tmp_path / ("s" * 108)
    with pytest.raises(OSError, match="too long") as caught:
        Server(Recorder(), path).run()
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0, 0o022, 0o777])
def test_a_socket_is_its_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with bind_listener(tmp_path / "sock"):
            found = (tmp_path / "sock").stat()
        with bind_listener(tmp_path / "shared", 0o660, NOBODY):
            shared = (tmp_path / "shared").stat()
    finally:
        os.umask(before)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert (stat.S_IMODE(shared.st_mode), shared.st_gid) == (0o660, NOBODY)
    assert not list(tmp_path.iterdir())


def test_nobody_else_can_hold_up_start_and_end(tmp_path: Path) -> None:
    """Whoever can read the folder can lock it."""
    reader = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(reader, fcntl.LOCK_EX)
    with running(tmp_path / "sock") as run, run.front_end() as front_end:
        front_end.request(m.Reset())
    os.close(reader)


def test_somebody_elses_lock_is_an_error_at_once(tmp_path: Path) -> None:
    lock = tmp_path / ".sock.lock"
    lock.touch()
    os.chown(lock, NOBODY, NOBODY)
    with pytest.raises(PermissionError, match="somebody else's lock"):
        Server(Recorder(), tmp_path / "sock").run()
    assert list(tmp_path.iterdir()) == [lock]


def test_a_lock_that_is_held_for_too_long_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "LOCK_PATIENCE", 0.02)
    lock = tmp_path / ".sock.lock"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    with pytest.raises(OSError, match="holds this lock"):
        Server(Recorder(), tmp_path / "sock").run()
    os.close(fd)


def test_of_many_that_start_at_once_one_gets_a_stale_socket(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    everybody = threading.Barrier(6)
    outcomes: list[str] = []

    def start() -> None:
        try:
            with bind_listener(path):
                outcomes.append("listens")
                everybody.wait(10)
        except SocketInUse:
            outcomes.append("in use")
            everybody.wait(10)

    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        together(*[start] * 6)
        assert sorted(outcomes) == ["in use"] * 5 + ["listens"]
        outcomes.clear()
    assert not list(tmp_path.iterdir())


def test_connecting_server_waits_reconnects_and_stops(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with running(path, listen=False) as run:
        for attempt in range(2):
            with bind_listener(path) as listener:
                listener.settimeout(10)
                sock, _ = listener.accept()
                front_end = FrontEnd(sock, FEATURES, lambda _: 0)
                assert front_end.negotiate() == OFFER.offer
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
