# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest memory in more ranges than a back end takes."""

import contextlib
from pathlib import Path

import pytest

from tests.support.bare_metal import plug
from tests.support.waiting import eventually
from tests.vm.bare_metal.vmbus.messages import CommandFor
from tests.vm.bare_metal.vmbus.stopped import add_dimm, options, qemu_with, stalling
from vhostvmbus.vhost_user.limits import ConnectionLimits
from vhostvmbus.vm.errors import VmError

FEW = ConnectionLimits(mem_slots=6)
"""As many as the ranges that the tests add."""
SOME = ConnectionLimits(mem_slots=12)
FREE = 3
"""How many of those are free: eight are firmware's, below 1 MiB, and main memory is one."""
SLOTS = ("-m", "128,slots=16,maxmem=4G")


def test_memory_that_does_not_fit(command_for: CommandFor, tmp_path: Path) -> None:
    """It is refused with words; the device goes on with what there is."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        back_end = stack.enter_context(stalling(path, limits=SOME)).run
        command = command_for("life", *options(path, ""), *SLOTS)
        qemu = stack.enter_context(qemu_with(command, tmp_path))
        for number in range(FREE):
            add_dimm(qemu, number)
        with pytest.raises(VmError, match=r"vhost-user-vmbus takes 12 ranges .* 12 are in use"):
            add_dimm(qemu, FREE)
        assert back_end.server.connections == 1
        assert not back_end.back_end.disconnected.acquire(timeout=0)
        assert "range" not in qemu.said.read_text()


def test_plug_with_memory_that_does_not_fit(command_for: CommandFor, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with (
        stalling(path, limits=FEW),
        qemu_with(command_for("life", *options(path), *SLOTS), tmp_path) as qemu,
    ):
        for number in range(6):
            add_dimm(qemu, number)
        with pytest.raises(VmError, match=r"guest memory has \d+ ranges, more than .* \(6\)"):
            plug(qemu.monitor)


def test_back_end_that_comes_back_and_takes_less(command_for: CommandFor, tmp_path: Path) -> None:
    """This is said once, however often it is tried; one that takes it all is taken again."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        with stalling(path):
            command = command_for("life", *options(path, ""), *SLOTS)
            qemu = stack.enter_context(qemu_with(command, tmp_path))
            for number in range(6):
                add_dimm(qemu, number)
        with stalling(path, limits=FEW) as few:
            eventually(lambda: few.run.server.connections >= 4)
        assert qemu.said.read_text().count("more than the back end can take (6)") == 1
        with stalling(path) as many:
            eventually(lambda: many.run.back_end.calls_of("code map"))
            assert many.run.server.connections == 1


def test_memory_in_many_parts(command_for: CommandFor, tmp_path: Path) -> None:
    """What could divide its memory into as many ranges as it likes has one, which is kept free."""
    path = tmp_path / "sock"
    with contextlib.ExitStack() as stack:
        stack.enter_context(stalling(path, limits=SOME))
        qemu = stack.enter_context(
            qemu_with(command_for("life", *options(path, ""), *SLOTS), tmp_path)
        )
        memory = {"qom_type": "memory-backend-memfd", "id": "parts", "size": 1 << 30}
        qemu.monitor.command("object-add", share=True, **memory)
        parts = {"memdev": "parts", "requested_size": 1 << 30, "dynamic_memslots": True}
        qemu.monitor.command("device_add", driver="virtio-mem-pci", **parts)
        for number in range(FREE - 1):
            add_dimm(qemu, number)
        with pytest.raises(VmError, match="11 are in use and 1 reserved; 1 more"):
            add_dimm(qemu, FREE)
