# SPDX-License-Identifier: GPL-2.0-or-later
"""Under translation, a guest executes what its disk delivered last; see "Translated code" in
``docs/vhost-user-vmbus.md``. The same tests with the invalidation switched off must fail, or
they would prove nothing.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.machines import DISK_SCRIPT, PROGRAMS, MakePlan, compiled
from tests.support.soak import times
from vhostvmbus.vm.backend import SERVE
from vhostvmbus.vm.cpio import CpioArchive
from vhostvmbus.vm.machine import Machine, Result

TRIES = times(20_000, 1_000_000)
TRIES_WITHOUT = 2_000
RUNS = times(120, 10_000)
WITHOUT = (sys.executable, str(PROGRAMS / "serve_without_invalidation.py"))


def code(value: int) -> bytes:
    """x86: a function that returns *value*, in a block of its own."""
    return (b"\xb8" + value.to_bytes(4, "little") + b"\xc3").ljust(4096, b"\xcc")


@pytest.fixture(scope="session")
def stale_code(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The test program."""
    return compiled("stale_code", tmp_path_factory.mktemp("programs"))


@pytest.fixture
def code_disk(tmp_path: Path) -> Path:
    path = tmp_path / "code.raw"
    path.write_bytes(code(1) + code(2) + bytes(1 << 20))
    return path


def run_stale_code(
    plan_for: MakePlan,
    program: bytes,
    disk: Path,
    tries: int,
    processes: int,
    serve: Sequence[str] = SERVE,
) -> Result:
    archive = CpioArchive()
    archive.add_file("/bin/stale_code", program, 0o755)
    plan = plan_for(disks=[disk], files=(archive.finish(),), accel="tcg", serve=serve)
    with Machine(plan) as machine:
        machine.wait_ready()
        return machine.run(DISK_SCRIPT + f"stale_code $(disk 0) {tries} {processes}", 3000)


def wrong(result: Result) -> tuple[int, int]:
    found = re.search(rb"wrong=(\d+) tries=(\d+)", result.stdout)
    assert found, result
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("processes", [1, 4])
def test_new_code_in_a_page_is_what_runs(
    plan_for: MakePlan, stale_code: bytes, code_disk: Path, processes: int
) -> None:
    result = run_stale_code(plan_for, stale_code, code_disk, TRIES, processes)
    assert wrong(result) == (0, TRIES)
    assert result.status == 0


@pytest.mark.parametrize("processes", [1, 4])
def test_without_invalidation_it_is_not(
    plan_for: MakePlan, stale_code: bytes, code_disk: Path, processes: int
) -> None:
    result = run_stale_code(
        plan_for, stale_code, code_disk, TRIES_WITHOUT, processes, serve=WITHOUT
    )
    count, tries = wrong(result)
    assert tries == TRIES_WITHOUT
    assert count > tries // 10
    assert result.status == 1


def test_every_program_in_little_memory(plan_for: MakePlan, root_template: Path) -> None:
    """Page frames of one program's code keep being used again for another's."""
    script = (PROGRAMS / "every_program.sh").read_text()
    plan = plan_for(
        root=root_template, memory="192M", append="init_on_alloc=0 oops=panic", accel="tcg"
    )
    with Machine(plan) as machine:
        machine.wait_ready()
        result = machine.run(f"set -- {RUNS}\n{script}", 3000)
        found = re.search(rb"runs=(\d+) crashes=(\d+)", result.stdout)
        assert found, result
        assert int(found[2]) == 0, result.stdout.decode()
        assert int(found[1]) == RUNS
        assert result.status == 0
        machine.poweroff()
