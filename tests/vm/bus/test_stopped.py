# SPDX-License-Identifier: GPL-2.0-or-later
"""A machine that is stopped: memory and disks stay as they are, and the guest notices nothing."""

from __future__ import annotations

import hashlib
import json
import mmap
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MEBIBYTE, MakePlan
from tests.support.net_rig import ADDRESSES, HOST4, HOST6, MAC, MODULE, QUEUES, Rig
from tests.support.network import namespace_name, require_root
from tests.support.soak import SOAK, times
from tests.support.waiting import eventually
from tests.vm.bus.test_inflight import COMPLAINTS, ENOUGH, LOAD
from vhostvmbus.vm import images
from vhostvmbus.vm.machine import Machine

STOPS = times(6, 50)
STOPPED = times(1, 5) * 0.2
"""Seconds between two looks at a machine that is stopped."""


def digest(path: Path) -> bytes:
    """Returns what tells whether a file has changed; it may be one of another process."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return hashlib.sha1(data).digest()


def memory_of(machine: Machine) -> Path:
    """Returns a name of the file that the guest's memory is."""
    folder = Path(f"/proc/{machine.qemu.pid}/fd")
    (memory,) = {
        path for path in folder.iterdir() if "memory-backend-memfd" in str(path.readlink())
    }
    return memory


def traffic(rig: Rig) -> int:
    """Returns how many bytes have gone both ways."""
    card = rig.card()
    return int(card["sent"]["bytes"] + card["received"]["bytes"])


@pytest.mark.parametrize("series", images.KERNEL_SERIES if SOAK else images.KERNEL_SERIES[-1:])
def test_under_load(
    series: str,
    plan_for: MakePlan,
    root_template: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """fio and floods both ways go on where they were; a back end is killed meanwhile, too."""
    require_root()
    chance = random.Random(1)
    disk = tmp_path / "disk.raw"
    name = namespace_name()
    link = f"netns:{name},mac={MAC.hex(':')},ip={HOST4}/24,ip={HOST6}/64,queues={QUEUES}"
    plan = plan_for(series, root=root_template, disks=[f"{disk}:256M"], networks=[link], smp=2)
    with Machine(plan) as machine:
        machine.wait_ready()
        rig = Rig(machine, name)
        rig.guest(f"{MODULE}; {ADDRESSES}")
        machine.check(DISK_SCRIPT + LOAD)
        memory = memory_of(machine)
        with rig.iperf_server():
            machine.check(
                f"iperf3 --client {HOST4} --bidir --time 3600 >/tmp/iperf 2>&1 </dev/null &"
            )
            eventually(lambda: rig.card()["sent"]["bytes"] > MEBIBYTE, 60)
            slowest = 0.0
            for turn in range(STOPS):
                before = traffic(rig)
                time.sleep(0.2 + 0.3 * chance.random())
                begin = time.monotonic()
                machine.monitor.command("stop")
                slowest = max(slowest, time.monotonic() - begin)
                seen = digest(memory), digest(disk)
                assert traffic(rig) > before
                time.sleep(STOPPED)
                assert (digest(memory), digest(disk)) == seen, turn
                machine.monitor.command("cont")
                machine.check("echo alive")
            machine.backends_may_end = True
            backend = next(backend for backend in machine.backends if backend.name != "net0")
            machine.monitor.command("stop")
            backend.kill()
            seen = digest(memory), digest(disk)
            backend.start()
            time.sleep(STOPPED)
            assert (digest(memory), digest(disk)) == seen
            machine.monitor.command("cont")
            machine.check("echo alive; sync")
            rig.guest("pkill -INT iperf3; true")
        jobs = []
        for turn in range(int(machine.check(ENOUGH))):
            text = machine.check(f"cat /tmp/fio.{turn}")
            jobs += json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"]
        assert jobs
        assert {job["error"] for job in jobs} == {0}
        assert machine.check(f"dmesg | grep -Ei '{COMPLAINTS}' || true") == ""
        rig.ping()
        record_property(f"{series}: stopped under load", f"{STOPS} times, {slowest:.2f} s at most")
        machine.poweroff()
