# SPDX-License-Identifier: GPL-2.0-or-later
"""The SCSI controller is unplugged: the guest removes its disks, and only then it goes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.scsi_guest import make_image
from tests.support.waiting import StoppedClock, eventually, in_thread
from vhostvmbus.channel import Channel
from vhostvmbus.device import quiet
from vhostvmbus.devices.scsi import ScsiController, leaving
from vhostvmbus.guest import ChannelNotOpen, GuestChannel, SoftwareGuest, serving
from vhostvmbus.guest.errors import ReceiveTimeout
from vhostvmbus.guest.storvsc import ENUMERATE_BUS, Storvsc
from vhostvmbus.vhost_user import messages as m

pytestmark = pytest.mark.usefixtures("plans")

TEST_UNIT_READY, INQUIRY, REPORT_LUNS = "000000000000", "120000002400", "a00000000000000000400000"
INVALID_LUN = 0x20
SOON = 5.0
"""Seconds in which a controller goes that waits for nobody; others wait twice as long here."""


@pytest.fixture(autouse=True)
def _sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes as long as Linux may."""
    monkeypatch.setattr(leaving, "CALM_SECONDS", 0.3)


class Watched(ScsiController):
    """Keeps what was outstanding when a channel was about to be closed, and when it was."""

    def __init__(self, disks: list[str]) -> None:
        super().__init__(disks)
        self.in_the_end: list[tuple[float, int]] = []

    def suspended(self, channel: Channel) -> None:
        ring = channel.ring_state
        assert ring is not None
        waiting = channel.outstanding + ring.rx_available + ring.tx_size - ring.tx_free
        self.in_the_end.append((time.monotonic(), waiting))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_image(tmp_path)


@pytest.fixture
def controller(image: Path, tmp_path: Path) -> Iterator[Watched]:
    with Watched([str(image), f"{tmp_path / 'second.raw'}:4M"]) as controller:
        yield controller


def next_notification(channel: GuestChannel, seconds: float) -> int:
    """The operation of the next packet of the host; 0 if none comes."""
    try:
        return int.from_bytes(channel.receive(seconds).payload[:4], "little")
    except ReceiveTimeout:
        return 0


def test_the_guest_removes_its_disks_first(
    controller: Watched, image: Path, tmp_path: Path
) -> None:
    """As Linux does it, with writes under way and a flush at the end of each disk."""
    with serving(controller) as (server, path, host), SoftwareGuest.connect(path) as guest:
        for turn in range(3):
            driver = Storvsc(guest, guest.enable())
            driver.initialize()
            assert driver.command(TEST_UNIT_READY).good
            unplugging, outcome = in_thread(guest.unplug)
            notified = 0
            under_way = []
            number = 0
            while not notified:
                number += 1
                under_way += [
                    driver.write(lun, bytes([number & 0xFF]) * 512, lun=lun) for lun in (0, 1)
                ]
                notified = next_notification(driver.channel, 0.001)
            assert notified == ENUMERATE_BUS
            luns = driver.command(REPORT_LUNS, room=64)
            assert luns.data[:4] == bytes(4)
            assert driver.command(INQUIRY, room=36).data[0] == 0x7F
            for lun in (0, 1):
                time.sleep(0.05)
                assert driver.command(TEST_UNIT_READY, lun=lun).srb_status == INVALID_LUN
            for lun in (0, 1):
                last = driver.write(8, bytes([turn]) * 4096, lun=lun)
                time.sleep(0.05)
                assert driver.read(8, 8, lun=lun).wait().data == bytes([turn]) * 4096
                assert last.wait().good
                assert driver.flush(lun=lun).good
            assert all(each.wait().good for each in under_way)
            flushed = time.monotonic()
            unplugging.join()
            assert outcome == [True]
            when, waiting = controller.in_the_end.pop()
            assert when > flushed
            assert waiting == 0
            for file in (image, tmp_path / "second.raw"):
                assert file.read_bytes()[4096:8192] == bytes([turn]) * 4096
            guest.reconnect(path)
            assert not host.offers.rescinded
        assert server.protocol_errors == 0
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        assert driver.command(TEST_UNIT_READY).good
        assert driver.command(REPORT_LUNS, room=64).data[3] == 16


def test_a_slow_flush_is_waited_for(controller: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(controller.unit(0).backing, "flush", lambda: go.wait(10))
    with SoftwareGuest.for_device(controller) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        guest.front_end.request(m.Unplug())
        assert next_notification(driver.channel, 5) == ENUMERATE_BUS
        for lun in (0, 1):
            assert driver.command(TEST_UNIT_READY, lun=lun).srb_status == INVALID_LUN
        slow = driver.submit(bytes.fromhex("35" + "00" * 9))
        time.sleep(1)
        assert guest.channel_offers == []
        go.set()
        assert slow.wait().good
        assert driver.flush(lun=1).good
        guest.wait_for_rescind(0)


@contextlib.contextmanager
def takes_notifications(driver: Storvsc) -> Iterator[list[int]]:
    """A driver that takes what the host sends, and does nothing about it."""
    taken: list[int] = []
    over = threading.Event()

    def take() -> None:
        while not over.is_set():
            try:
                if notification := next_notification(driver.channel, 0.02):
                    taken.append(notification)
            except ChannelNotOpen:
                return

    thread, _ = in_thread(take)
    try:
        yield taken
    finally:
        over.set()
        thread.join()


def test_a_guest_that_does_not_look(
    controller: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is waited for, but not for ever; nor is one that looks and goes on."""
    monkeypatch.setattr(leaving, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(leaving, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(leaving, "PATIENCE_SECONDS", 0.2)
    with SoftwareGuest.for_device(controller) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        with takes_notifications(driver) as taken:
            assert guest.unplug()
        assert len(taken) > 1, "it is told more than once"
        assert set(taken) == {ENUMERATE_BUS}
    assert "does not look" in caplog.text
    assert "does not come to rest" in caplog.text


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_a_guest_that_is_stopped_keeps_its_time(
    controller: Watched, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """A minute passes, and it has taken nothing: it goes on where it was, with all its disks."""
    clock = StoppedClock()
    monkeypatch.setattr(quiet, "time", clock)
    with SoftwareGuest.for_device(controller) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        guest.front_end.request(m.Unplug())
        assert next_notification(driver.channel, 10) == ENUMERATE_BUS
        for lun in range(looks):
            assert driver.command(TEST_UNIT_READY, lun=lun).srb_status == INVALID_LUN

        def told() -> bool:
            clock.tick(0.02)
            return driver.channel.ring.state.rx_available > 0

        eventually(told)  # once more, and it does not take it
        clock.pass_seconds(60)
        assert guest.channel_offers == []
        assert next_notification(driver.channel, 10) == ENUMERATE_BUS
        for lun in range(looks, 2):
            assert driver.command(TEST_UNIT_READY, lun=lun).srb_status == INVALID_LUN
        assert driver.flush(lun=0).good
        assert driver.flush(lun=1).good

        def gone() -> bool:
            clock.tick(0.02)
            with contextlib.suppress(ChannelNotOpen):
                next_notification(driver.channel, 0.001)
            return guest.channel_offers == [m.RescindChannel(0)]

        eventually(gone)


def test_a_controller_that_is_not_in_use(
    controller: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not open, or not negotiated: nobody to wait for."""
    monkeypatch.setattr(leaving, "CALM_SECONDS", 2 * SOON)
    with serving(controller) as (_, path, _), SoftwareGuest.connect(path) as guest:
        for opened in (False, True):
            if opened:
                guest.enable()
            begin = time.monotonic()
            assert guest.unplug()
            assert time.monotonic() - begin < SOON
            guest.reconnect(path)


def test_the_guest_closes_the_channel_meanwhile(
    controller: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is nothing to wait for, and who opens it again has the disks."""
    monkeypatch.setattr(leaving, "LOOK_SECONDS", 2 * SOON)
    with SoftwareGuest.for_device(controller) as guest:
        Storvsc(guest, guest.enable()).initialize()
        guest.front_end.request(m.Unplug())
        eventually(lambda: controller._leaving.active)
        guest.disable(0)
        begin = time.monotonic()
        guest.wait_for_rescind(0)
        assert time.monotonic() - begin < SOON
        assert not controller._leaving.active


def test_without_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to look at, so nothing to wait for but the news."""
    monkeypatch.setattr(leaving, "LOOK_SECONDS", 2 * SOON)
    with ScsiController() as controller, SoftwareGuest.for_device(controller) as guest:
        driver = Storvsc(guest, guest.enable())
        driver.initialize()
        unplugging, outcome = in_thread(guest.unplug)
        assert next_notification(driver.channel, 5) == ENUMERATE_BUS
        unplugging.join(SOON)
        assert outcome == [True]
