# SPDX-License-Identifier: GPL-2.0-or-later
"""KMCL's client endpoint in a real guest: the kernel module vmbus_user against Python devices.

The cases are in ``programs/kmcl_*.py`` and run in the guest, all in one go for each kernel; the
tests here look at how each ended. What takes a hand at the host has a test of its own.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.machines import MakePlan, plug, unplug
from tests.support.paths import EXAMPLES, PROGRAMS
from vhostvmbus.vm import images
from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.machine import Machine

GUEST_FILES = ("guest", "support", "data", "traffic", "life")
PROGRAM = "python3 /run/vhostvmbus/tools/kmcl_guest.py"
DEVICES = PROGRAMS / "kmcl_devices.py"
CASES = [
    name
    for part in ("data", "traffic", "life")
    for name in re.findall(r"^def case_(\w+)", (PROGRAMS / f"kmcl_{part}.py").read_text(), re.M)
]
ALL_CASES_SECONDS = 300
LOG_ALLOWED = re.compile(r"loading out-of-tree|module verification|is not a GUID")
LOG_TROUBLE = re.compile(r"WARNING|BUG|Oops|Call Trace|vmbus_user:|leak|hung task")


@dataclass(frozen=True)
class KmclGuest:
    """A guest with the module, and how all cases ended."""

    series: str
    machine: Machine
    results: dict[str, dict[str, Any]]


def guest_files() -> bytes:
    archive = CpioArchive()
    for part in GUEST_FILES:
        source = PROGRAMS / f"kmcl_{part}.py"
        archive.add_file(f"/guest/tools/{source.name}", source.read_bytes())
    return archive.finish()


@pytest.fixture(scope="module", params=images.KERNEL_SERIES)
def kmcl(
    request: pytest.FixtureRequest, plan_for: MakePlan, root_template: Path
) -> Iterator[KmclGuest]:
    devices = [[f"{DEVICES}:Obedient"], [f"{DEVICES}:Refusing"]]
    devices += [[f"{EXAMPLES}/pfn_digest.py:PfnDigest"], [f"{EXAMPLES}/echo.py:Echo"]]
    plan = plan_for(
        request.param, root=root_template, backends=devices, files=(guest_files(),),
    )  # fmt: skip
    with Machine(plan) as machine:
        machine.wait_ready()
        lines = machine.check(PROGRAM, ALL_CASES_SECONDS).splitlines()
        results = {result["case"]: result for result in map(json.loads, lines)}
        yield KmclGuest(request.param, machine, results)
        machine.poweroff()


@pytest.mark.parametrize("case", CASES)
def test_case(kmcl: KmclGuest, case: str) -> None:
    problem = kmcl.results[case]["problem"]
    assert problem is None, f"in the guest:\n{problem}"


def complaints(machine: Machine) -> list[str]:
    log = machine.check("dmesg").splitlines()
    assert any("registering driver vmbus_user" in line for line in log)
    return [line for line in log if LOG_TROUBLE.search(line) and not LOG_ALLOWED.search(line)]


def test_the_kernel_has_nothing_to_complain_of(kmcl: KmclGuest) -> None:
    assert complaints(kmcl.machine) == []


def test_the_tool_with_the_examples(kmcl: KmclGuest) -> None:
    """As ``make run-vm DEVICE=… CMD=…`` would; it binds the devices by itself."""
    script = """
    set -e
    cd /tmp
    digest=2d5bc5a2-4a86-4d0a-8b6f-3a0c9f1f6e57
    echo=6c0cb9a5-5b1b-4c0f-9d0b-6fb8d2a0e4c1
    head -c 300001 /dev/urandom >data
    vmbus-user send -d $digest -p data
    sha256sum <data
    vmbus-user send -d $digest -p data -o 4095 -c 3
    vmbus-user send -d $echo -m 'sent inline' -b | tr '\\0' .; echo
    vmbus-user send -d $echo -x 0102030405060708
    vmbus-user list
    vmbus-user info -d $echo | grep state
    status=0
    vmbus-user receive -d $echo -t 100 2>/dev/null || status=$?
    echo status $status
    ! vmbus-user send -d $digest -n 8 -o 4096
    ! vmbus-user send -d 00000000-0000-0000-0000-000000000000
    """
    lines = kmcl.machine.check(script).splitlines()
    digest = lines[0]
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert lines[1].split()[0] == digest
    assert lines[2:5] == [digest] * 3
    assert lines[5:7] == ["sent inline.....", "0102030405060708"]
    listed = [line.split() for line in lines[7:-2]]
    ours = [driver for _, class_id, driver in listed if class_id.startswith(("2d5bc5", "6c0cb9"))]
    assert ours == ["vmbus_user"] * 2
    assert lines[-2:] == ["state closed", "status 2"]


def start_beside(machine: Machine, what: str) -> None:
    """Start the guest's program in the background, and wait until it is ready."""
    machine.check(
        f"""
        rm -rf /tmp/{what}; mkdir /tmp/{what}
        {PROGRAM} {what} /tmp/{what} >/tmp/{what}/result 2>&1 </dev/null &
        for i in $(seq 600); do [ -e /tmp/{what}/ready ] && exit; sleep 0.1; done
        cat /tmp/{what}/result; exit 1
        """
    )


def result_of(machine: Machine, what: str) -> None:
    """Wait for its end, which has to be a good one."""
    line = machine.check(
        f"for i in $(seq 900); do [ -s /tmp/{what}/result ] && break; sleep 0.1; done; "
        f"cat /tmp/{what}/result"
    )
    problem = json.loads(line)["problem"]
    assert problem is None, f"in the guest:\n{problem}"


@pytest.mark.parametrize("what", ["killed", "without"])
def test_the_back_end_is_killed_and_comes_back(kmcl: KmclGuest, what: str) -> None:
    """Packets are in flight. Their user waits for it, or is killed meanwhile."""
    machine = kmcl.machine
    backend = next(b for b in machine.backends if b.name == "device0")
    start_beside(machine, what)
    machine.backends_may_end = True
    backend.kill()
    machine.check(
        f"touch /tmp/{what}/killed; "
        f"until [ -e /tmp/{what}/away ] || [ -s /tmp/{what}/result ]; do sleep 0.1; done"
    )
    backend.start()
    machine.check(f"touch /tmp/{what}/back")
    result_of(machine, what)


@pytest.mark.parametrize("turn", range(3))
def test_the_device_is_unplugged_and_plugged_in_again(kmcl: KmclGuest, turn: int) -> None:
    """The host takes the offer back while packets are in flight."""
    machine = kmcl.machine
    start_beside(machine, "unplugged")
    unplug(machine, "vmbus1")
    machine.check(
        "until [ -e /tmp/unplugged/gone ] || [ -s /tmp/unplugged/result ]; do sleep 0.1; done", 60
    )
    plug(machine, "vmbus1")
    result_of(machine, "unplugged")
    assert complaints(machine) == []


def test_how_fast(kmcl: KmclGuest, record_property: Callable[[str, object], None]) -> None:
    """Not judged, only recorded: round trips a second, one at a time, for 0, 1, 16, 256 PFNs."""
    lines = kmcl.machine.check(f"{PROGRAM} rates").splitlines()
    figures = {row["pages"]: row["per_second"] for row in map(json.loads, lines)}
    assert sorted(figures) == [0, 1, 16, 256]
    assert all(figure > 0 for figure in figures.values())
    record_property("round_trips_per_second", figures)
    print(f"kernel {kmcl.series}: round trips a second by PFNs {figures}")


def test_pages_hold_what_the_tool_says(kmcl: KmclGuest) -> None:
    """The host writes into a program's pages: the tool stores them."""
    script = """
    vmbus-user send -d b7f2a6d1-0c35-4e8e-9f53-7b1d2a90c4e6 -m '{"op": "fill", "seed": 7}' \
        -n 100000 -o 77 -w /tmp/filled >/dev/null && sha256sum </tmp/filled
    """
    expected = hashlib.shake_128((7).to_bytes(8, "little")).digest(100000)
    found = kmcl.machine.check(script).split()[0]
    assert found == hashlib.sha256(expected).hexdigest()
