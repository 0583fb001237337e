# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk as sg3_utils sees it, through the guest's own SCSI layer."""

import pytest

from tests.support.machines import DATA_LUN, DATA_SIZE, MEBIBYTE, SCRATCH_LUN, SCRATCH_SIZE, Guest

PLACE = 700 * MEBIBYTE // 512
"""A block of the scratch disk that no other test uses."""


def test_inquiry(guest: Guest) -> None:
    text = guest.check(f"sg_inq $(disk {DATA_LUN})")
    assert "PDT=0" in text or "Peripheral device type: disk" in text
    assert "Vendor identification:" in text
    assert "Product revision level:" in text


def test_every_vital_product_data_page_that_is_listed(guest: Guest) -> None:
    listed = guest.check(f"sg_vpd --page=sv --raw $(disk {DATA_LUN}) | od -An -v -tx1").split()
    pages = listed[4:]
    assert {"00", "80", "83", "b0", "b1", "b2"} <= set(pages)
    for page in pages:
        # Page 00h for sg_vpd is "sv"; the others are decoded by number.
        guest.check(f"sg_vpd --page=0x{page} $(disk {DATA_LUN})")
    identity = guest.check(f"sg_vpd --page=di $(disk {DATA_LUN})")
    assert "NAA" in identity
    limits = guest.check(f"sg_vpd --page=bl $(disk {DATA_LUN})")
    assert "Maximum unmap LBA count" in limits


def test_two_disks_have_two_identities(guest: Guest) -> None:
    seen = {guest.check(f"sg_vpd --page=di --quiet $(disk {lun})") for lun in (0, 1, 2)}
    assert len(seen) == 3


def test_capacity(guest: Guest) -> None:
    for lun, size in ((DATA_LUN, DATA_SIZE), (SCRATCH_LUN, SCRATCH_SIZE)):
        for word in ("", "--16"):
            words = guest.check(f"sg_readcap --brief {word} $(disk {lun})").split()
            assert (int(words[0], 16), int(words[1], 16)) == (size // 512, 512)


def test_luns_are_reported(guest: Guest) -> None:
    text = guest.check(f"sg_luns $(disk {DATA_LUN})")
    assert "Lun list length = 24" in text


def test_listed_operation_codes_are_answered(guest: Guest) -> None:
    text = guest.check(f"sg_opcodes $(disk {DATA_LUN})")
    for name in (
        "Inquiry",
        "Read(10)",
        "Write(16)",
        "Synchronize cache",
        "Unmap",
        "Write same(16)",
    ):
        assert name.lower() in text.lower()
    one = guest.check(f"sg_opcodes --opcode=0x28 $(disk {DATA_LUN})")
    assert "Read(10)" in one


def test_mode_pages(guest: Guest) -> None:
    text = guest.check(f"sg_modes --all $(disk {DATA_LUN})")
    assert "Caching" in text
    queue = f"/sys/block/$(basename $(disk {DATA_LUN}))/queue"
    assert guest.check(f"cat {queue}/write_cache").strip() == "write back"


def test_unmap_and_write_same(guest: Guest) -> None:
    disk = f"$(disk {SCRATCH_LUN})"
    at = f"--lba={PLACE}"
    digest = f"dd if={disk} iflag=direct bs=4096 skip={PLACE // 8} count=1 status=none | sha256sum"
    fill = (
        f"dd if=/dev/urandom of={disk} oflag=direct bs=4096 seek={PLACE // 8} count=1 status=none"
    )
    zero = guest.check("head -c 4096 /dev/zero | sha256sum")
    guest.check(fill)
    assert guest.check(digest) != zero
    guest.check(f"sg_unmap --force {at} --num=8 {disk}")
    assert guest.check(digest) == zero
    for how in ("--16", "--10", "--16 --unmap"):
        guest.check(fill)
        guest.check(f"sg_write_same {how} {at} --num=8 --xferlen=512 {disk}")
        assert guest.check(digest) == zero
    guest.check("printf '\\241%.0s' $(seq 512) >/tmp/pattern")
    guest.check(f"sg_write_same --16 {at} --num=8 --in=/tmp/pattern --xferlen=512 {disk}")
    expected = guest.check("for i in 1 2 3 4 5 6 7 8; do cat /tmp/pattern; done | sha256sum")
    assert guest.check(digest) == expected


def test_verify(guest: Guest) -> None:
    disk = f"$(disk {DATA_LUN})"
    guest.check(f"sg_verify --lba=0 --count=1024 {disk}")
    guest.check(f"dd if={disk} of=/tmp/block bs=512 count=8 status=none")
    guest.check(f"sg_verify --lba=0 --count=8 --ebytchk=1 --ndo=4096 --in=/tmp/block {disk}")
    guest.check("printf x | dd of=/tmp/block bs=1 conv=notrunc seek=100 status=none")
    result = guest.machine.run(
        f"device=/dev/$(basename /sys/bus/scsi/devices/*:{DATA_LUN}/block/*); "
        "sg_verify --lba=0 --count=8 --ebytchk=1 --ndo=4096 --in=/tmp/block $device"
    )
    assert result.status == 14, result.stderr  # SG_LIB_CAT_MISCOMPARE


def test_synchronize_cache(guest: Guest) -> None:
    guest.check(f"sg_sync $(disk {SCRATCH_LUN}); sg_sync --16 $(disk {SCRATCH_LUN})")


@pytest.mark.parametrize("command", ["28", "2a", "88", "8a"])
def test_a_transfer_past_the_end_is_refused(guest: Guest, command: str) -> None:
    """Sense key ILLEGAL REQUEST, LOGICAL BLOCK ADDRESS OUT OF RANGE (21h)."""
    last = SCRATCH_SIZE // 512
    if command in ("28", "2a"):
        cdb = bytes((int(command, 16), 0)) + last.to_bytes(4, "big") + bytes((0, 0, 1, 0))
    else:
        cdb = bytes((int(command, 16), 0)) + last.to_bytes(8, "big") + bytes((0, 0, 0, 1, 0, 0))
    words = " ".join(f"{byte:02x}" for byte in cdb)
    direction = "-s 512 -i /dev/zero" if command in ("2a", "8a") else "-r 512"
    result = guest.machine.run(
        f"sg_raw {direction} /dev/$(basename /sys/bus/scsi/devices/*:{SCRATCH_LUN}/block/*) {words}"
    )
    assert result.status == 22, result.stderr  # SG_LIB_LBA_OUT_OF_RANGE
    assert b"Logical block address out of range" in result.stderr


def test_an_unknown_command_is_refused(guest: Guest) -> None:
    result = guest.machine.run(
        f"sg_raw /dev/$(basename /sys/bus/scsi/devices/*:{DATA_LUN}/block/*) c1 00 00 00 00 00"
    )
    assert result.status == 9, result.stderr  # SG_LIB_CAT_INVALID_OP
    guest.check(f"sg_turs $(disk {DATA_LUN})")
