# SPDX-License-Identifier: GPL-2.0-or-later
"""The guest closes, resets or goes away while its commands run: they do not outlive that.

What is written by the next session is not overwritten by the one before, however slow the host's
disk is, and a disk that hangs does not keep the guest from going on.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.scsi_guest import MIB, Rig, make_image
from tests.support.waiting import eventually, in_thread
from vhostvmbus.devices.scsi import ScsiController, lease
from vhostvmbus.devices.scsi.disk import FileDisk
from vhostvmbus.guest import SoftwareGuest, serving
from vhostvmbus.guest.storvsc import RESET_BUS, PendingRequest, Storvsc

BLOCKS = 8 * MIB // 512
NOT_READY = (2, 4, 1)


class HeldDisk(FileDisk):
    """An image on a disk that is as slow as the test wants: every change waits for ``go``."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.held = False
        self.go = threading.Event()
        self.running = threading.Event()
        self.steps = 0

    def _wait(self) -> None:
        if self.held:
            self.steps += 1
            self.running.set()
            assert self.go.wait(20)

    def write(self, offset: int, payload: bytes) -> None:
        self._wait()
        super().write(offset, payload)

    def discard(self, offset: int, length: int) -> None:
        self._wait()
        super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._wait()
        super().write_zeroes(offset, length, unmap=unmap)


@pytest.fixture
def disk(tmp_path: Path) -> HeldDisk:
    return HeldDisk(str(make_image(tmp_path)))


@pytest.fixture
def rig(disk: HeldDisk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setattr(lease, "STEP_BYTES", MIB)
    with ScsiController([disk]) as controller, SoftwareGuest.for_device(controller) as guest:
        yield Rig(Path(disk.path), controller, guest)
        disk.go.set()


def write_same(driver: Storvsc) -> PendingRequest:
    return driver.submit(struct.pack(">BBQIxx", 0x93, 0, 0, BLOCKS), data=b"\xaa" * 512)


def write_zeroes(driver: Storvsc) -> PendingRequest:
    return driver.submit(struct.pack(">BBQIxx", 0x93, 1, 0, BLOCKS))


def unmap(driver: Storvsc) -> PendingRequest:
    extents = b"".join(struct.pack(">QI4x", 2048 * n, 2048) for n in range(8))
    parameters = struct.pack(">HH4x", len(extents) + 6, len(extents)) + extents
    return driver.submit(struct.pack(">B6xHx", 0x42, len(parameters)), data=parameters)


def write_and_verify(driver: Storvsc) -> PendingRequest:
    return driver.submit(struct.pack(">BBQIxx", 0x8E, 0, 0, 2048), data=b"\xaa" * MIB)


ENDS: list[Callable[[SoftwareGuest], None]] = [
    lambda guest: guest.disable(0),
    lambda guest: guest.reset(),
]
End = Callable[[SoftwareGuest], None]
Command = Callable[[Storvsc], PendingRequest]


def next_session(rig: Rig) -> Storvsc:
    driver = Storvsc(rig.guest, rig.guest.enable(ring_pages=(33, 33)))
    driver.initialize()
    return driver


@pytest.mark.parametrize("end", ENDS, ids=["close", "reset"])
@pytest.mark.parametrize("command", [write_same, write_zeroes, unmap, write_and_verify])
def test_nothing_is_changed_after_the_acknowledgement(
    rig: Rig, disk: HeldDisk, command: Command, end: End
) -> None:
    """A disk that is slow, and not dead: the step under way is waited for, and is the last."""
    disk.held = True
    command(rig.driver)
    assert disk.running.wait(10)
    held = rig.controller._open[0].lease
    ending, _ = in_thread(lambda: end(rig.guest))
    eventually(lambda: held.over)
    disk.go.set()
    ending.join(20)
    assert not ending.is_alive()
    steps, content = disk.steps, rig.image.read_bytes()
    driver = next_session(rig)
    new = b"\xbb" * 4096
    assert driver.write(BLOCKS - 8, new).wait().good
    eventually(lambda: not rig.controller._disks[0].users)
    assert disk.steps == steps == 1
    assert driver.read(BLOCKS - 8, 8).wait().data == new
    assert rig.image.read_bytes() == content[:-4096] + new


def test_the_connection_ends(disk: HeldDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing goes on either; the next connection does once more what was not done."""
    monkeypatch.setattr(lease, "STEP_BYTES", MIB)
    with ScsiController([disk]) as controller, serving(controller) as (_, path, _):
        guest = SoftwareGuest.connect(path)
        rig = Rig(Path(disk.path), controller, guest)
        disk.held = True
        request = write_same(rig.driver)
        assert disk.running.wait(10)
        held = controller._open[0].lease
        ending, _ = in_thread(guest.disconnect)
        eventually(lambda: held.over)
        disk.go.set()
        ending.join(20)
        eventually(lambda: not controller._disks[0].users)
        assert disk.steps == 1
        disk.held = False
        guest.reconnect(path)
        assert request.wait().good
        assert rig.image.read_bytes() == b"\xaa" * 8 * MIB
        guest.close()


@pytest.mark.parametrize("end", ENDS, ids=["close", "reset"])
def test_a_disk_that_hangs(
    rig: Rig, disk: HeldDisk, end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing does not wait for it for long; until it has ended, the disk is not ready."""
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.05)
    disk.held = True
    write_same(rig.driver)
    assert disk.running.wait(10)
    end(rig.guest)
    disk.held = False
    driver = next_session(rig)
    for request in (driver.write(0, b"\xbb" * 512), driver.read(0, 1), driver.submit(bytes(6))):
        assert request.wait().sense_code == NOT_READY
    assert driver.command("12 00 00 00 24 00", room=36).good, "it is there"
    disk.go.set()
    eventually(lambda: driver.command(bytes(6)).good)
    assert disk.steps == 1
    assert driver.write(0, b"\xbb" * 512).wait().good
    assert driver.read(0, 1).wait().data == b"\xbb" * 512


def test_a_hanging_disk_is_waited_for_once(
    tmp_path: Path, disk: HeldDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many channels have something under way: their time does not add up."""
    waited: list[float] = []
    end = lease.Lease.end
    monkeypatch.setattr(
        lease.Lease, "end", lambda self, until: waited.append(until) or end(self, until)
    )
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.1)
    with (
        ScsiController([disk]) as controller,
        SoftwareGuest.for_device(controller) as guest,
    ):
        rig = Rig(Path(disk.path), controller, guest, (17, 17))
        drivers = [rig.driver, *rig.driver.create_sub_channels(1, ring_pages=(17, 17))]
        disk.held = True
        for driver in drivers:
            write_same(driver)
        eventually(lambda: disk.steps == 2)
        guest.reset()
        assert len(waited) == 2
        assert len(set(waited)) == 1
        assert len(controller.unit(0).stragglers) == 2
        disk.go.set()
        eventually(lambda: not controller.unit(0).stragglers)


def test_a_request_that_had_not_begun_does_nothing(rig: Rig, disk: HeldDisk) -> None:
    """Eight threads are busy; what waits for them is dropped with its channel."""
    disk.held = True
    for _ in range(12):
        unmap(rig.driver)
    eventually(lambda: disk.steps == 8)
    mode_select = bytes.fromhex("15 10 0000 18 00")
    rig.driver.submit(mode_select, data=bytes(4) + b"\x08\x12" + bytes(18))
    disk.go.set()
    rig.guest.reset()
    eventually(lambda: not rig.controller._disks[0].users)
    unit = rig.controller.unit(0)
    assert unit.write_cache
    content = rig.image.read_bytes()
    assert next_session(rig).read(0, 8).wait().data == content[:4096]


def test_a_reset_does_not_reach_the_next_session(
    rig: Rig, disk: HeldDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RESET_BUS waits for a command that hangs; then the guest closes, and opens again."""
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.05)
    disk.held = True
    unmap(rig.driver)
    assert disk.running.wait(10)
    rig.channel.submit(struct.pack("<III", RESET_BUS, 1, 0).ljust(64, b"\0"))
    eventually(lambda: len(rig.controller._requests._resets))
    rig.guest.disable(0)
    driver = next_session(rig)
    disk.go.set()
    eventually(lambda: not rig.controller._disks[0].users)
    eventually(lambda: not rig.controller.unit(0).stragglers)
    assert driver.command(bytes(6)).good, "no unit attention"
