# SPDX-License-Identifier: GPL-2.0-or-later
"""Under translation QEMU does what it can of REP MOVS and REP STOS a page at a time; a guest's
program may not be able to tell. A program that real processors pass looks for a difference."""

import re
from pathlib import Path

from tests.support.machines import MakePlan, compiled
from tests.support.soak import times
from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.machine import Machine

TRIES = times(10_000, 1_000_000)


def test_no_difference_is_seen(plan_for: MakePlan, tmp_path: Path) -> None:
    archive = CpioArchive()
    archive.add_file("/bin/string_ops", compiled("string_ops", tmp_path), 0o755)
    with Machine(plan_for(files=(archive.finish(),), accel="tcg")) as machine:
        machine.wait_ready()
        text = machine.check(
            "grep -m 1 -o -w fsrm /proc/cpuinfo; "  # so that the kernel uses them, too
            f"string_ops {TRIES} & string_ops {TRIES}; one=$?; wait $! && exit $one",
            3000,
        )
        machine.poweroff()
    assert text.startswith("fsrm\n")
    assert re.findall(r"wrong=(\d+) tries=(\d+)", text) == [("0", f"{TRIES}")] * 2
