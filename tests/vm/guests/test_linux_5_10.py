# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux 5.10, the last kernel that knows the oldest versions of VMBus.

It looks for the bridge's memory window in a parent of the VMBus device, and for channels in other
places of the SynIC's pages than later ones do. The guest of most tests is one machine.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MEBIBYTE, MakePlan, write_random
from tests.support.net_rig import HOST4, MAC, TROUBLE, Rig, there_and_back, trouble
from tests.support.network import namespace_name, require_root
from vhostvmbus.vm.machine import Machine

SERIES = "5.10"
SIZE = 8 * MEBIBYTE
VERSION = "dmesg | sed -n 's/.*Vmbus version:\\([0-9.]*\\).*/\\1/p'"


@dataclass(frozen=True)
class Guest:
    """The guest, with its root, random data on LUN 1, scratch space on LUN 2, and a card."""

    rig: Rig
    data_digest: str
    scratch: Path

    def check(self, script: str) -> str:
        return self.rig.machine.check(DISK_SCRIPT + script)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An image of random bytes, and their SHA-256."""
    path = tmp_path_factory.mktemp("old") / "data.raw"
    return path, write_random(path, SIZE)


@pytest.fixture(scope="module")
def guest(plan_for: MakePlan, root_template: Path, data: tuple[Path, str]) -> Iterator[Guest]:
    require_root()
    path, digest = data
    scratch = path.with_name("scratch.raw")
    name = namespace_name()
    plan = plan_for(
        SERIES,
        root=root_template,
        disks=[f"{path},ro", f"{scratch}:{SIZE // MEBIBYTE}M"],
        networks=[f"netns:{name},mac={MAC.hex(':')},ip={HOST4}/24"],
    )
    with Machine(plan) as machine:
        machine.wait_ready()
        yield Guest(Rig(machine, name), digest, scratch)
        assert trouble(machine) == []
        machine.poweroff()


def test_it_is_that_kernel(guest: Guest) -> None:
    assert guest.check("uname -r").startswith(f"{SERIES}.")


def test_disks_hold_what_is_on_them(guest: Guest) -> None:
    assert guest.check("sha256sum <$(disk 1)").split()[0] == guest.data_digest
    written = guest.check(
        f"head -c {SIZE} /dev/urandom >/tmp/sent && "
        "dd if=/tmp/sent of=$(disk 2) bs=1M oflag=direct status=none && "
        "sha256sum </tmp/sent && rm /tmp/sent"
    )
    assert written.split()[0] == hashlib.sha256(guest.scratch.read_bytes()).hexdigest()


def test_bytes_go_both_ways_over_the_card(guest: Guest) -> None:
    guest.rig.bring_up()
    with guest.rig.echo() as port:
        guest.check(there_and_back(port, 4 * MEBIBYTE))


@pytest.mark.parametrize(("version", "number"), [("0.13", 0x0000_000D), ("1.1", 0x0001_0001)])
def test_the_oldest_versions(
    version: str, number: int, plan_for: MakePlan, data: tuple[Path, str]
) -> None:
    """Their channels have no interrupts of their own: one bit for all, and a page that says which
    channel."""
    path, digest = data
    append = f"oops=panic hv_vmbus.max_version={number:#x}"
    with Machine(plan_for(SERIES, disks=[f"{path},ro"], append=append)) as machine:
        machine.wait_ready()
        assert machine.check(VERSION) == f"{version}\n"
        assert machine.check(f"{DISK_SCRIPT}sha256sum <$(disk 0)").split()[0] == digest
        assert TROUBLE.findall(machine.check("dmesg")) == []
        machine.poweroff()
