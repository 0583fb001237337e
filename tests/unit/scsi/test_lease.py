# SPDX-License-Identifier: GPL-2.0-or-later
"""Leases: no step begins after their end, and what goes on is counted; the pool of threads."""

from __future__ import annotations

import threading
import time

import pytest

from tests.support.waiting import eventually, in_thread
from vhostvmbus.devices.scsi import lease
from vhostvmbus.devices.scsi.lease import Cancelled, Lease, Patience, Stragglers, pieces
from vhostvmbus.devices.scsi.pool import IoPool


@pytest.mark.parametrize(
    ("offset", "length", "parts"),
    [
        (0, 0, []),
        (0, 10, [(0, 10)]),
        (0, 16, [(0, 16)]),
        (5, 16, [(5, 11), (16, 5)]),
        (16, 40, [(16, 16), (32, 16), (48, 8)]),
    ],
)
def test_pieces(
    offset: int, length: int, parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STEP_BYTES", 16)
    assert list(pieces(offset, length)) == parts


def test_nothing_begins_after_the_end() -> None:
    held = Lease()
    held.check()
    with held.step():
        pass
    assert held.end(0) == 0
    assert held.over
    with pytest.raises(Cancelled):
        held.check()
    with pytest.raises(Cancelled), held.step():
        pytest.fail("the step began")


def test_what_is_under_way_is_waited_for() -> None:
    held, go, began = Lease(), threading.Event(), threading.Event()

    def work() -> None:
        with held.step():
            began.set()
            go.wait(20)

    worker, _ = in_thread(work)
    assert began.wait(10)
    held.stop()
    ending, left = in_thread(lambda: held.end(time.monotonic() + 20))
    assert ending.is_alive()
    go.set()
    ending.join(20)
    worker.join(20)
    assert left == [0]


def test_what_is_not_waited_for_is_a_straggler_until_it_ends() -> None:
    held, stragglers, gone = Lease(), Stragglers(), threading.Event()
    stragglers.gone = gone.set
    with held.step(stragglers), held.step(stragglers), held.step():
        assert held.end(0) == 3
        assert len(stragglers) == 2
        assert not gone.is_set()
    assert not stragglers
    assert gone.is_set()


def test_patience_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(lease.time, "monotonic", lambda: now)
    patience = Patience()
    first = patience.deadline()
    assert first == now + lease.PATIENCE_SECONDS
    now += 9.0
    assert patience.deadline() == first
    now += 2.0
    assert patience.deadline() == now + lease.PATIENCE_SECONDS


def test_the_pool_has_its_threads_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, done = IoPool(2, "pool"), threading.Event()

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pool.submit(done.set)
        assert done.wait(10)
        with pytest.raises(OSError, match="0 of 3 threads"):
            IoPool(3, "pool")
    assert pool.close(10)


def test_the_pool_outlives_a_defect(caplog: pytest.LogCaptureFixture) -> None:
    pool, done = IoPool(1, "pool"), threading.Event()
    pool.submit(lambda: 1 // 0)
    pool.submit(done.set)
    assert done.wait(10)
    assert "ZeroDivisionError" in caplog.text
    assert pool.close(10)


def test_the_pool_does_not_wait_for_what_hangs() -> None:
    pool, go, running = IoPool(1, "pool"), threading.Event(), threading.Event()

    def hang() -> None:
        running.set()
        go.wait(20)

    pool.submit(hang)
    assert running.wait(10)
    assert not pool.close(0.01)
    go.set()
    eventually(lambda: pool.close(0))


def test_the_pool_has_a_thread_at_least() -> None:
    with pytest.raises(ValueError, match="threads"):
        IoPool(0, "pool")
