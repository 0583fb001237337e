# SPDX-License-Identifier: GPL-2.0-or-later
"""SVM under translation (patch 0051), on which ``ACCEL=nested`` rests: a bare-metal hypervisor."""

from pathlib import Path

import pytest

from tests.support.bare_metal import DEBUG_EXIT, build_guest, qemu_command, report_of

CPU = "qemu64,+svm,+cr8legacy"
VMMCALL = 0x81


@pytest.fixture(scope="module")
def command(qemu: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """QEMU's command line, but for the scenario at its end."""
    guest = build_guest(Path(__file__).parent, tmp_path_factory.mktemp("svm"))
    return qemu_command(qemu, "-cpu", CPU, "-kernel", str(guest), *DEBUG_EXIT, "-append")


def test_no_interrupt_is_lost_while_a_virtual_one_waits(command: list[str]) -> None:
    """A timer that expires in the main loop at the moment that the vCPU executes VMRUN."""
    assert report_of([*command, "timer"]) == [("lost", 0), ("strange", 0), ("enough", 1)]


def test_priority_of_a_waiting_virtual_interrupt(command: list[str]) -> None:
    """A write of CR8 lets it through; QEMU lives."""
    assert report_of([*command, "priority"]) == [("exit", VMMCALL)]
