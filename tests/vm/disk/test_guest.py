# SPDX-License-Identifier: GPL-2.0-or-later
"""A stock guest that has booted from our disk."""

from tests.support.machines import Guest


def test_the_root_file_system_is_on_our_disk(guest: Guest) -> None:
    device = guest.check("findmnt -n -o SOURCE /").strip()
    assert device.startswith("/dev/sd")
    link = guest.check(f"readlink -f /sys/block/{device.removeprefix('/dev/')}").strip()
    # The class of the synthetic SCSI controller, as the guest saw it in the offer.
    vmbus = guest.check(f"cd {link}; while [ ! -e class_id ]; do cd ..; done; cat class_id")
    assert vmbus.strip() == "{ba6163d9-04a1-4d29-b605-72e2ffb1dc7f}"


def test_the_kernel_is_the_one_asked_for(guest: Guest) -> None:
    assert guest.check("uname -r").startswith(guest.series + ".")


def test_the_guest_met_hyper_v_and_nothing_complained(guest: Guest) -> None:
    log = guest.check("dmesg")
    assert "Hypervisor detected: Microsoft Hyper-V" in log
    assert "Vmbus version:" in log
    for word in ("BUG:", "WARNING:", "Call Trace", "blocked for more than"):
        assert word not in log
    assert "hv_storvsc" in guest.check("ls /sys/bus/vmbus/drivers")


def test_commands_get_their_output_whole_and_apart(guest: Guest) -> None:
    result = guest.machine.run("printf 'out\\0\\377\\r\\n'; printf 'err\\1' >&2; exit 41")
    assert (result.status, result.stdout, result.stderr) == (41, b"out\0\xff\r\n", b"err\1")


def test_disks_are_named_by_lun(guest: Guest) -> None:
    root = guest.check("findmnt -n -o SOURCE /").strip()
    assert guest.check("readlink -f /dev/disk/by-lun/0").strip() == root
    for lun in (1, 2):
        named = guest.check(f"readlink -f /dev/disk/by-lun/{lun}; disk {lun}").split()
        assert named[0] == named[1]
