# SPDX-License-Identifier: GPL-2.0-or-later
"""The disk gives back what was written, whoever wrote it, however hard it is pressed."""

import hashlib
import os
import subprocess
from pathlib import Path

from tests.support.machines import (
    DATA_LUN,
    DATA_SIZE,
    MEBIBYTE,
    SCRATCH_LUN,
    SCRATCH_SIZE,
    Guest,
)
from tests.support.soak import SOAK, times
from vhostvmbus.vm.initramfs import sbin_tool

FIO_SIZE = f"{times(96, 512)}M"
FIO_LOOPS = times(1, 20)


def test_every_byte_of_the_data_disk(guest: Guest) -> None:
    guest.check("echo 3 >/proc/sys/vm/drop_caches")
    text = guest.check(f"sha256sum <$(disk {DATA_LUN})", 300)
    assert text.split()[0] == guest.data_digest
    size = guest.check(f"blockdev --getsize64 $(disk {DATA_LUN})")
    assert int(size) == DATA_SIZE


def test_direct_reads_in_large_blocks(guest: Guest) -> None:
    text = guest.check(
        f"dd if=$(disk {DATA_LUN}) bs=4M skip=20 count=6 iflag=direct status=none | sha256sum"
    )
    with open(guest.data, "rb") as file:
        file.seek(80 * MEBIBYTE)
        assert text.split()[0] == hashlib.sha256(file.read(24 * MEBIBYTE)).hexdigest()


def test_reads_of_odd_sizes_and_places(guest: Guest) -> None:
    for offset, length in ((0, 512), (512, 512), (3584, 1024), (4096 - 512, 513 * 512)):
        text = guest.check(
            f"dd if=$(disk {DATA_LUN}) iflag=direct,skip_bytes,count_bytes "
            f"bs={length} skip={offset} count={length} status=none | sha256sum"
        )
        with open(guest.data, "rb") as file:
            file.seek(offset)
            assert text.split()[0] == hashlib.sha256(file.read(length)).hexdigest()


def test_what_the_guest_writes_is_in_the_file(guest: Guest) -> None:
    length = 48 * MEBIBYTE + 512
    text = guest.check(
        f"head -c {length} /dev/urandom >/tmp/written; sha256sum </tmp/written; "
        f"dd if=/tmp/written of=$(disk {SCRATCH_LUN}) bs=1M seek=3 conv=fsync,notrunc status=none; "
        "rm /tmp/written",
        300,
    )
    with open(guest.scratch, "rb") as file:
        file.seek(3 * MEBIBYTE)
        assert hashlib.sha256(file.read(length)).hexdigest() == text.split()[0]


def test_what_the_host_has_not_written_stays(guest: Guest) -> None:
    """A write of one sector changes one sector."""
    offset = 200 * MEBIBYTE + 7 * 512
    with open(guest.scratch, "r+b") as file:
        file.seek(offset - 4096)
        file.write(b"\xa5" * 12288)
    guest.check(
        f"printf '\\132%.0s' $(seq 512) | dd of=$(disk {SCRATCH_LUN}) oflag=direct,seek_bytes "
        f"bs=512 seek={offset} status=none"
    )
    with open(guest.scratch, "rb") as file:
        file.seek(offset - 4096)
        assert file.read(12288) == b"\xa5" * 4096 + b"Z" * 512 + b"\xa5" * 7680


def test_random_mixed_load_is_verified(guest: Guest) -> None:
    guest.check(
        f"fio --name=mix --filename=$(disk {SCRATCH_LUN}) --rw=randrw --direct=1 "
        f"--ioengine=libaio --iodepth=32 --numjobs=2 --offset_increment={FIO_SIZE} "
        f"--size={FIO_SIZE} --loops={FIO_LOOPS} --bsrange=512-128k --bs_unaligned=0 "
        "--blockalign=512 --verify=crc32c --verify_fatal=1 --do_verify=1 --output=/tmp/fio.log || "
        "{ cat /tmp/fio.log >&2; false; }",
        3000 if SOAK else 600,
    )


def test_a_file_system_is_clean_afterwards(guest: Guest) -> None:
    """ext4 under load, checked by the guest and, the guest having let go of it, by the host."""
    guest.check(
        f"""
        set -e
        mkfs.ext4 -q -F $(disk {SCRATCH_LUN})
        mount $(disk {SCRATCH_LUN}) /mnt
        fio --name=files --directory=/mnt --rw=randrw --ioengine=libaio --iodepth=32 --numjobs=2 \\
            --size=48M --nrfiles=16 --bsrange=512-64k --verify=crc32c --verify_fatal=1 \\
            --output=/tmp/fio.log || {{ cat /tmp/fio.log >&2; false; }}
        cp -a /usr/bin /mnt/bin
        rm -rf /mnt/files.0.*
        (cd /usr/bin && find . -type f | sort | xargs sha256sum) >/tmp/before
        umount /mnt
        e2fsck -f -n $(disk {SCRATCH_LUN})
        mount $(disk {SCRATCH_LUN}) /mnt
        (cd /mnt/bin && sha256sum --quiet -c /tmp/before)
        umount /mnt
        sync
        """,
        600,
    )
    done = subprocess.run(
        [sbin_tool("e2fsck"), "-f", "-n", guest.scratch], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_discard_makes_holes_and_sparse_files_stay_sparse(guest: Guest) -> None:
    guest.check(
        f"dd if=/dev/urandom of=$(disk {SCRATCH_LUN}) bs=1M count=64 seek=600 oflag=direct "
        "status=none",
        300,
    )
    full = _allocated(guest.scratch)
    guest.check(f"blkdiscard -o $((600 << 20)) -l $((64 << 20)) $(disk {SCRATCH_LUN})")
    assert _allocated(guest.scratch) <= full - 60 * MEBIBYTE
    with open(guest.scratch, "rb") as file:
        file.seek(600 * MEBIBYTE)
        assert file.read(64 * MEBIBYTE) == bytes(64 * MEBIBYTE)
    guest.check(f"blkdiscard $(disk {SCRATCH_LUN})")
    assert _allocated(guest.scratch) < MEBIBYTE
    assert guest.scratch.stat().st_size == SCRATCH_SIZE


def _allocated(path: Path) -> int:
    return os.stat(path).st_blocks * 512
