# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that go without goodbye: a kernel started over another, panics, a kernel for a panic."""

import time
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, MakePlan, write_random
from tests.support.paths import EXAMPLES, PROGRAMS
from vhostvmbus.vm import images
from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.machine import Machine

TOOLS = "/root/kexec"
DIGEST = "2d5bc5a2-4a86-4d0a-8b6f-3a0c9f1f6e57"
LOAD = f"python3 {TOOLS}/kexec_load.py"
SAME = '"$(cat /proc/cmdline)"'
SMALL = r'"$(sed "s/crashkernel=[^ ]*//" /proc/cmdline)"'
QUIETLY = ">/dev/null 2>&1 </dev/null &"
BUSY = f"""
for number in 1 2 3; do
    (while :; do dd if=$(disk 1) of=/dev/null bs=256k iflag=direct; done) {QUIETLY}
done
(while :; do vmbus-user send -d {DIGEST} -p /usr/bin/ls && touch /tmp/sent; done) {QUIETLY}
rm -f /tmp/sent
until [ -e /tmp/sent ]; do sleep 0.1; done
"""
BOOT_SECONDS = 120


def wait_for_boot(machine: Machine, number: int) -> None:
    """Wait for a boot; a panic on the console is no failure here."""
    deadline = time.monotonic() + BOOT_SECONDS
    while machine.boots < number:
        assert machine.qemu.status is None, machine.qemu.last_words()
        assert time.monotonic() < deadline, machine.console_log.read_text(errors="replace")[-4000:]
        time.sleep(0.1)
    assert machine.boots == number
    machine.streams.console.panic = None


def files_for(kernel: images.Kernel) -> bytes:
    archive = CpioArchive()
    archive.add_file("/guest/tools/kexec_load.py", (PROGRAMS / "kexec_load.py").read_bytes())
    archive.add_file("/guest/tools/vmlinuz", kernel.image.read_bytes())
    archive.add_file("/guest/tools/initramfs", images.find_initramfs(kernel).read_bytes())
    return archive.finish()


@pytest.mark.parametrize("series", images.KERNEL_SERIES)
def test_kernels_that_end_amid_their_work(
    series: str, plan_for: MakePlan, root_template: Path, tmp_path: Path
) -> None:
    """Disk and packets busy each time; the next kernel finds bus and devices as new."""
    kernel = images.find_kernel(series)
    disk = tmp_path / "disk.raw"
    digest = write_random(disk, 32 << 20)
    plan = plan_for(
        series,
        root=root_template,
        disks=[disk],
        backends=[[f"{EXAMPLES}/pfn_digest.py:PfnDigest"]],
        files=(files_for(kernel),),
        append="panic=1 crashkernel=320M",
        extra=("-action", "panic=none"),
        memory="1G",
    )

    with Machine(plan) as machine:
        machine.wait_ready()
        # To the disk: the initramfs of the kernels to come does not have them.
        machine.check(f"cp -r /run/vhostvmbus/tools {TOOLS}; sync")
        for boot, end in enumerate(
            (
                f"{LOAD} now {TOOLS}/vmlinuz {TOOLS}/initramfs {SAME}",
                f"{LOAD} crash {TOOLS}/vmlinuz {TOOLS}/initramfs {SMALL} && "
                "echo c >/proc/sysrq-trigger",
                "echo c >/proc/sysrq-trigger",
            ),
            2,
        ):
            machine.submit(DISK_SCRIPT + BUSY + end)
            wait_for_boot(machine, boot)
            if boot == 3:
                assert machine.check("wc -c </proc/vmcore").strip() != "0"
            found = machine.check(f"{DISK_SCRIPT} sha256sum <$(disk 1)").split()[0]
            assert found == digest
            reply = machine.check(f"vmbus-user send -d {DIGEST} -p /usr/bin/ls").split()[0]
            assert reply == machine.check("sha256sum </usr/bin/ls").split()[0]
        machine.poweroff()
