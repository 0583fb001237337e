# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices come and go while a stock guest runs: ``device_add``, ``device_del``, reboots."""

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.footprint import Repeated
from tests.support.machines import (
    DISK_SCRIPT,
    MEBIBYTE,
    MakePlan,
    device_of,
    plug,
    unplug,
    watched,
    write_random,
)
from tests.support.soak import times
from vhostvmbus.vm import images
from vhostvmbus.vm.backend import BackEndProcess
from vhostvmbus.vm.machine import Machine

SIZE = 8 * MEBIBYTE
TURNS = times(3, 200)
UNDER_LOAD = times(2, 20)
CHARDEV = "vmbus1"
TROUBLE = re.compile(r"WARNING|BUG|Oops|Call Trace|hung task|hv_vmbus: .*(fail|unable)")
FIND = f"""
find_ours() {{
    for disk in /sys/block/sd*; do
        grep -qx {SIZE // 512} $disk/size && echo ${{disk##*/}} && return
    done
    return 1
}}
"""
"""A shell function for the guest: the name of the disk that comes and goes."""


@dataclass(frozen=True)
class Hotplug:
    """A guest with its root on one controller, and a disk on a second one."""

    machine: Machine
    disk: Path
    digest: str

    def check(self, script: str, timeout: float = 120.0) -> str:
        return self.machine.check(FIND + DISK_SCRIPT + script, timeout)

    def wait_for_disk(self) -> None:
        self.check("for i in $(seq 300); do find_ours && exit; sleep 0.1; done; lsblk; exit 1")

    def take_disk(self) -> None:
        """As an administrator may do first."""
        self.check("echo 1 >/sys/block/$(find_ours)/device/delete; ! find_ours")

    def devices(self) -> int:
        return int(self.check("ls /sys/bus/vmbus/devices | wc -l"))


@pytest.fixture(scope="module", params=images.KERNEL_SERIES)
def hotplug(
    request: pytest.FixtureRequest,
    plan_for: MakePlan,
    root_template: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Hotplug]:
    disk = tmp_path_factory.mktemp("hotplug") / "disk.raw"
    digest = write_random(disk, SIZE)
    plan = plan_for(
        request.param, root=root_template, backends=[["scsi", str(disk)]], smp=4
    )  # fmt: skip
    with Machine(plan) as machine:
        machine.wait_ready()
        yield Hotplug(machine, disk, digest)
        assert TROUBLE.findall(machine.check("dmesg -t")) == []
        machine.poweroff()


def test_a_controller_comes_and_goes(hotplug: Hotplug, repeated: Repeated) -> None:
    machine = hotplug.machine
    backend = next(backend for backend in machine.backends if backend.name == "device0")
    kernel = hotplug.check("uname -r").strip()
    what = f"{kernel}: a controller comes and goes"
    hotplug.wait_for_disk()
    for _ in repeated(what, TURNS, *watched(machine, backend)):
        text = hotplug.check("sha256sum </dev/$(find_ours)")
        assert text.split()[0] == hotplug.digest
        assert hotplug.devices() == 2
        unplug(machine, CHARDEV)
        assert hotplug.devices() == 1
        plug(machine, CHARDEV)
        hotplug.wait_for_disk()
        wait_for_channels(hotplug)


LOAD = f"""
disk=/dev/$(find_ours)
fio --name=direct --filename=$disk --direct=1 --rw=randrw --ioengine=libaio --iodepth=32 \
    --offset=2M --size=3M --time_based --runtime=600 >/tmp/fio.log 2>&1 </dev/null &
(while dd if=/dev/urandom of=$disk bs=1M seek=5 count=3 conv=notrunc,nocreat; do :; done) \
    >/tmp/dd.log 2>&1 </dev/null &
for i in $(seq 300); do
    [ $(cut -c 1- /sys/block/${{disk#/dev/}}/stat | awk '{{print $5}}') -gt 2000 ] && break
    sleep 0.1
done
head -c {2 * MEBIBYTE} /dev/urandom >/tmp/known
dd if=/tmp/known of=$disk bs=1M conv=notrunc,nocreat,fsync status=none
sha256sum </tmp/known
"""
"""Requests in flight, and a cache that is dirty, all the time; and 2 MiB that are safe."""


def test_a_controller_goes_under_load(hotplug: Hotplug) -> None:
    """What was made durable is there, and everyone who used the disk learns that it is gone."""
    hotplug.wait_for_disk()
    before = hotplug.disk.read_bytes()
    for _ in range(UNDER_LOAD):
        known = hotplug.check(LOAD).split()[0]
        unplug(hotplug.machine, CHARDEV)
        hotplug.check(
            "for i in $(seq 300); do pgrep -x 'fio|dd' >/dev/null || exit 0; sleep 0.1; done; "
            "ps; cat /tmp/fio.log /tmp/dd.log; exit 1"
        )
        assert hotplug.devices() == 1
        after = hotplug.disk.read_bytes()
        assert hashlib.sha256(after[: 2 * MEBIBYTE]).hexdigest() == known
        assert after[5 * MEBIBYTE :] != before[5 * MEBIBYTE :]
        with open(hotplug.disk, "r+b") as file:
            file.write(before)
        plug(hotplug.machine, CHARDEV)
        hotplug.wait_for_disk()
    assert hotplug.check("sha256sum </dev/$(find_ours)").split()[0] == hotplug.digest


def test_a_file_system_that_is_mounted(hotplug: Hotplug) -> None:
    """As if the disk were pulled out; Linux lets go of the controller when it is unmounted."""
    hotplug.wait_for_disk()
    before = hotplug.disk.read_bytes()
    mount = "mkdir -p /tmp/mnt; mount /dev/$(find_ours) /tmp/mnt"
    known = hotplug.check(
        f"mkfs.ext4 -q -F /dev/$(find_ours); {mount}; head -c 1M /dev/urandom >/tmp/mnt/known; "
        "sync -f /tmp/mnt/known; md5sum </tmp/mnt/known; "
        "(while dd if=/dev/zero of=/tmp/mnt/more bs=64k count=30; do :; done) "
        ">/tmp/dd.log 2>&1 </dev/null & "
        "for i in $(seq 300); do [ -s /tmp/mnt/more ] && exit; sleep 0.1; done; exit 1"
    )
    monitor = hotplug.machine.monitor
    deleted = monitor.count("DEVICE_DELETED")
    monitor.command("device_del", id=device_of(hotplug.machine, CHARDEV))
    hotplug.check("for i in $(seq 300); do find_ours || exit 0; sleep 0.1; done; exit 1")
    hotplug.check(
        "for i in $(seq 300); do pgrep -x dd >/dev/null || break; sleep 0.1; done; "
        "umount /tmp/mnt; ! grep /tmp/mnt /proc/mounts"
    )
    deadline = time.monotonic() + 30
    while monitor.count("DEVICE_DELETED") == deleted:
        assert time.monotonic() < deadline, "the guest keeps the controller"
        time.sleep(0.02)
    plug(hotplug.machine, CHARDEV)
    hotplug.wait_for_disk()
    assert known == hotplug.check(f"{mount}; md5sum </tmp/mnt/known; umount /tmp/mnt")
    unplug(hotplug.machine, CHARDEV)
    with open(hotplug.disk, "r+b") as file:
        file.write(before)
    plug(hotplug.machine, CHARDEV)
    hotplug.wait_for_disk()


def test_no_driver_is_bound(hotplug: Hotplug) -> None:
    """The guest has the device but does not use it: it releases it all the same."""
    hotplug.wait_for_disk()
    hotplug.take_disk()
    hotplug.check(
        "for d in /sys/bus/vmbus/drivers/hv_storvsc/*-*; do "
        "ls -d $d/host*/target*/*/block/* >/dev/null 2>&1 || "
        "echo ${d##*/} >/sys/bus/vmbus/drivers/hv_storvsc/unbind; done"
    )
    unplug(hotplug.machine, CHARDEV)
    assert hotplug.devices() == 1
    plug(hotplug.machine, CHARDEV)
    hotplug.wait_for_disk()


@pytest.mark.parametrize("times", [1, 2])
def test_at_a_reboot(hotplug: Hotplug, times: int) -> None:
    """What a guest does not let go of, a reset does, however far the device was on its way out."""
    machine = hotplug.machine
    hotplug.wait_for_disk()
    before = machine.monitor.count("DEVICE_DELETED")
    machine.monitor.command("stop")
    boots = machine.boots
    path = device_of(machine, CHARDEV)
    for _ in range(times):
        machine.monitor.command("device_del", id=path)
    assert machine.monitor.count("DEVICE_DELETED") == before
    machine.monitor.command("system_reset")
    machine.monitor.command("cont")
    machine.wait_ready(boots=boots + 1)
    assert machine.monitor.count("DEVICE_DELETED") == before + 1
    assert hotplug.devices() == 1
    plug(machine, CHARDEV)
    hotplug.wait_for_disk()
    assert hotplug.check("sha256sum </dev/$(find_ours)").split()[0] == hotplug.digest


def wait_for_channels(hotplug: Hotplug) -> None:
    """The disk is there with the first channel; the subchannels may be offered after it."""
    hotplug.check(
        "for i in $(seq 300); do "
        "[ $(ls -d /sys/bus/vmbus/devices/*/channels/* | wc -l) = 8 ] && exit; sleep 0.1; done; "
        "ls -d /sys/bus/vmbus/devices/*/channels/*; exit 1"
    )


def channels_of(hotplug: Hotplug) -> list[list[str]]:
    """The channels' target CPUs, for each controller of the guest."""
    wait_for_channels(hotplug)
    text = hotplug.check(
        "for d in /sys/bus/vmbus/devices/*; do cat $d/channels/*/cpu | tr '\\n' ' '; echo; done"
    )
    return [line.split() for line in text.splitlines()]


def test_a_channel_for_each_cpu(hotplug: Hotplug) -> None:
    """storvsc asks for subchannels; each has its interrupt elsewhere, and carries requests."""
    hotplug.wait_for_disk()
    found = channels_of(hotplug)
    assert [sorted(cpus) for cpus in found] == [["0", "1", "2", "3"]] * 2
    script = """
    for cpu in 0 1 2 3; do
        taskset -c $cpu dd if=/dev/$(find_ours) of=/dev/null bs=4k count=64 iflag=direct \
            status=none
    done
    cd -P /sys/block/$(find_ours)/device/../../..
    for channel in channels/*; do cat $channel/interrupts; done
    """
    counts = [int(line) for line in hotplug.check(script).split()]
    assert len(counts) == 4
    assert min(counts) > 0


def test_subchannels_come_again(hotplug: Hotplug) -> None:
    """With the driver, with the device, and with the guest."""
    hotplug.wait_for_disk()
    hotplug.take_disk()
    hotplug.check(
        """
        cd /sys/bus/vmbus/drivers/hv_storvsc
        for d in *-*; do
            ls -d $d/host*/target*/*/block/* >/dev/null 2>&1 && continue
            echo $d >unbind
            echo $d >bind
        done
        """
    )
    hotplug.wait_for_disk()
    wait_for_channels(hotplug)
    unplug(hotplug.machine, CHARDEV)
    plug(hotplug.machine, CHARDEV)
    hotplug.wait_for_disk()
    assert [len(cpus) for cpus in channels_of(hotplug)] == [4, 4]
    hotplug.machine.reboot()
    hotplug.wait_for_disk()
    assert [len(cpus) for cpus in channels_of(hotplug)] == [4, 4]
    assert hotplug.check("sha256sum </dev/$(find_ours)").split()[0] == hotplug.digest


def test_the_first_device_comes_late(plan_for: MakePlan, tmp_path: Path) -> None:
    """The guest has run without one, so QEMU had no reason to say which code it translated."""
    disk = tmp_path / "disk.raw"
    digest = write_random(disk, SIZE)
    back_end = BackEndProcess("late", ["scsi", str(disk)], tmp_path)
    try:
        chardev = f"socket,id=late,path={back_end.socket},reconnect-ms=250"
        with Machine(plan_for("6.1", extra=("-chardev", chardev))) as machine:
            machine.wait_ready()
            hotplug = Hotplug(machine, disk, digest)
            assert hotplug.check("ls /sys/bus/vmbus/devices | wc -l").strip() == "0"
            for _ in range(2):
                plug(machine, "late")
                hotplug.wait_for_disk()
                assert hotplug.check("sha256sum </dev/$(find_ours)").split()[0] == digest
                unplug(machine, "late")
            machine.poweroff()
        assert back_end.problem is None
    finally:
        back_end.stop()
