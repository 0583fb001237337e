# SPDX-License-Identifier: GPL-2.0-or-later
"""What QEMU does by itself about a device whose back end never says that its guest is ready."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.machines import MakePlan, device_of, plug
from tests.support.paths import PROGRAMS
from vhostvmbus.observe.statistics import read_statistics
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.machine import Machine

CHARDEV = "never"
PROGRAM = PROGRAMS / "never_ready.py"
LIMIT = 10.0
"""Seconds that QEMU gives a back end."""
SOON = LIMIT - 2
"""Seconds in which a device goes that does not wait for the limit."""
SCANNED = (
    "for device in /sys/bus/vmbus/devices/*; do echo >$device/driver_override; done; "
    "for host in /sys/class/scsi_host/*; do echo '- - -' >$host/scan; done"
)
"""For the guest: returns when its driver has probed the device, and no look for disks runs."""


@dataclass(frozen=True)
class Rig:
    """A guest in its initramfs, and a back end whose device comes and goes."""

    machine: Machine
    back_end: BackEndProcess

    def plug(self) -> None:
        """Until the guest's driver has the device, and waits for nothing from it.

        Linux never lets go of a device that owes it an answer and is gone.
        """
        plug(self.machine, CHARDEV)
        deadline = time.monotonic() + 20
        while not read_statistics(self.back_end.socket)["channels"]:
            assert time.monotonic() < deadline, "the guest does not take the device"
            time.sleep(0.05)
        self.machine.check(SCANNED)

    def unplug(self) -> None:
        self.machine.monitor.command("device_del", id=device_of(self.machine, CHARDEV))

    @property
    def deleted(self) -> int:
        return self.machine.monitor.count("DEVICE_DELETED")

    def wait_deleted(self, before: int, patience: float = SOON) -> None:
        deadline = time.monotonic() + patience
        while self.deleted == before:
            assert time.monotonic() < deadline, "the device is still there"
            time.sleep(0.02)

    def devices(self) -> int:
        return int(self.machine.check("ls /sys/bus/vmbus/devices | wc -l"))


@pytest.fixture(scope="module")
def rig(plan_for: MakePlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    back_end = BackEndProcess("never", [f"{PROGRAM}:NeverReady"], tmp_path_factory.mktemp("never"))
    try:
        chardev = f"socket,id={CHARDEV},path={back_end.socket},reconnect-ms=100"
        with Machine(plan_for("6.12", extra=("-chardev", chardev))) as machine:
            machine.wait_ready()
            yield Rig(machine, back_end)
            machine.poweroff()
        assert back_end.problem is None
    finally:
        back_end.stop()


def test_a_time_limit(rig: Rig) -> None:
    """The device works until then, and when it is plugged in again."""
    for _ in range(2):
        rig.plug()
        before, begun = rig.deleted, time.monotonic()
        rig.unplug()
        time.sleep(LIMIT / 2)
        assert rig.devices() == 1
        rig.wait_deleted(before, LIMIT + 20)
        assert time.monotonic() - begun > LIMIT - 0.5
        assert rig.devices() == 0


def test_asked_a_second_time(rig: Rig) -> None:
    rig.plug()
    before = rig.deleted
    rig.unplug()
    time.sleep(0.5)
    assert rig.deleted == before
    rig.unplug()
    rig.wait_deleted(before)
    assert rig.devices() == 0


@pytest.mark.parametrize("first", ["kill", "device_del"])
def test_no_back_end(rig: Rig, first: str) -> None:
    """Nobody brings the driver to rest: the next one is waited for, but for who asks twice."""
    rig.plug()
    before = rig.deleted
    if first == "device_del":
        rig.unplug()
        time.sleep(0.5)
        assert rig.deleted == before
    rig.back_end.kill()
    if first == "kill":
        rig.unplug()
    time.sleep(LIMIT + 1.5)
    assert rig.deleted == before
    rig.unplug()
    rig.wait_deleted(before)
    assert rig.devices() == 0
    rig.back_end.start()


def test_the_next_back_end_is_asked(rig: Rig) -> None:
    """However late it comes; and has its own time for it."""
    rig.plug()
    before = rig.deleted
    rig.back_end.kill()
    rig.unplug()
    time.sleep(LIMIT + 1.5)
    assert rig.deleted == before
    begun = time.monotonic()
    rig.back_end.start()
    rig.wait_deleted(before, LIMIT + 20)
    assert time.monotonic() - begun > LIMIT - 0.5
    assert rig.devices() == 0


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("how", ["system_reset", "rmmod"])
def test_the_guest_has_gone(rig: Rig, how: str, alone: bool) -> None:
    """A guest that begins anew has lost the device; one that unloads its driver is at rest, which
    the back end says, or QEMU finds when there is none."""
    rig.plug()
    before, boots = rig.deleted, rig.machine.boots
    if alone:
        rig.back_end.kill()
    rig.unplug()
    time.sleep(0.5)
    assert rig.deleted == before
    if how == "system_reset":
        rig.machine.monitor.command("system_reset")
        rig.wait_deleted(before)
        rig.machine.wait_ready(boots=boots + 1)
    else:
        rig.machine.check("rmmod hv_storvsc")
        rig.wait_deleted(before)
        rig.machine.check("modprobe hv_storvsc")
    assert rig.devices() == 0
    if alone:
        rig.back_end.start()


def test_a_guest_that_does_not_use_the_device(rig: Rig) -> None:
    """Nobody has to be brought to rest."""
    rig.machine.check("rmmod hv_storvsc")
    plug(rig.machine, CHARDEV)
    rig.machine.check(
        "for i in $(seq 100); do ls /sys/bus/vmbus/devices/*-* >/dev/null 2>&1 && exit; "
        "sleep 0.1; done; exit 1"
    )
    before = rig.deleted
    rig.unplug()
    rig.wait_deleted(before)
    rig.machine.check("modprobe hv_storvsc")
