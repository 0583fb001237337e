# SPDX-License-Identifier: GPL-2.0-or-later
"""The bare-metal guest on a bus with one device: QEMU's own, or one in another process."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bare_metal import (
    DEBUG_EXIT,
    Report,
    build_guest,
    qemu_command,
    report_of,
    served_by,
)
from tests.vm.bare_metal.vmbus.messages import CommandFor
from vhostvmbus.vm.backend import BackEndProcess

SCENARIOS = Path(__file__).parent
CPU = "qemu64,hv-relaxed,hv-vpindex,hv-synic,hv-time,hv-vapic,hv-runtime,hv-stimer"


@pytest.fixture(scope="session")
def bus_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bare-metal guest, a multiboot kernel."""
    return build_guest(SCENARIOS, tmp_path_factory.mktemp("vmbus"))


@pytest.fixture
def back_end(tmp_path: Path) -> Iterator[BackEndProcess]:
    """The SCSI controller, in a process of its own."""
    process = BackEndProcess("scsi", ["scsi", f"{tmp_path / 'disk.raw'}:1M"], tmp_path)
    try:
        yield process
        assert process.problem is None
    finally:
        process.stop()


@pytest.fixture(params=["hv-balloon", "vhost-user-vmbus"])
def device(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """QEMU's options for the device; its name comes last."""
    if request.param == "hv-balloon":
        return "-device", request.param
    return served_by(request.getfixturevalue("back_end"))


@pytest.fixture
def command_for(qemu: Path, bus_guest: Path) -> CommandFor:
    """Makes QEMU's command line of a scenario and the words for its device."""

    def command_for(scenario: str, *words: str) -> list[str]:
        words = ("-cpu", CPU, "-kernel", str(bus_guest), "-append", scenario, *DEBUG_EXIT, *words)
        return qemu_command(qemu, "-device", "vmbus-bridge", *words)

    return command_for


@pytest.fixture
def command(command_for: CommandFor, device: tuple[str, ...]) -> CommandFor:
    """Makes QEMU's command line of a scenario with the device."""
    return lambda scenario, *words: command_for(scenario, *words, *device)


@pytest.fixture
def run(command: CommandFor) -> Callable[[str], Report]:
    """Runs a scenario, in which the guest must not get QEMU to write to its log."""

    return lambda scenario: report_of(command(scenario), timeout=120, quiet=True)
