# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card's data path: whose sections are whose when a buffer is taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.ram import Ram, scattered
from vhostvmbus.devices.net.buffers import CONTROL_RESERVE, ReceiveBuffer, SendBuffer
from vhostvmbus.devices.net.datapath import DataPath
from vhostvmbus.memory import ExternalData, GuestMemory
from vhostvmbus.wire.errors import ExternalDataClosed
from vhostvmbus.wire.gpa import GpaRange

PAGES = 16
SIZE = 2048
FRAMES = PAGES * 4096 // SIZE - CONTROL_RESERVE
"""Sections of the data path's."""


class Rig:
    def __init__(self) -> None:
        self.ram = Ram()
        self.memory: GuestMemory = self.ram.memory()
        self.path = DataPath()

    def mapping(self) -> ExternalData:
        return self.memory.external_data([GpaRange.of_pages(scattered(PAGES))])

    def memory_in_use(self) -> bool:
        return any(region.users for region in self.memory.regions)

    def buffer(self) -> ReceiveBuffer:
        return ReceiveBuffer(self.mapping(), 1, SIZE, self.path)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.path.take_back(True)
    rig.path.take_back(False)
    rig.memory.close()
    rig.ram.close()


def test_a_section_of_the_buffer_before_is_none_of_this_one(rig: Rig) -> None:
    old = rig.buffer()
    rig.path.lend_receive(old)
    numbers = [rig.path.section(old.lease) for _ in range(FRAMES)]
    assert None not in numbers
    assert rig.path.section(old.lease) is None
    left = [old.section_number(number) for number in numbers if number is not None]
    rig.path.take_back(True)
    new = rig.buffer()
    rig.path.lend_receive(new)
    taken = [rig.path.section(new.lease) for _ in range(FRAMES)]
    assert rig.path.free_sections == 0
    old.give(left)  # the guest completes, late, what Python had told it of
    assert rig.path.free_sections == 0
    assert rig.path.section(old.lease) is None
    new.give([new.section_number(number) for number in taken if number is not None])
    assert rig.path.free_sections == FRAMES
    old.mapping.close()
    assert rig.path.free_sections == FRAMES  # the mapping that ended was not this one's
    new.mapping.close()
    assert rig.path.free_sections == 0


def test_a_mapping_that_has_ended_is_not_lent(rig: Rig) -> None:
    receive, send = rig.buffer(), SendBuffer(rig.mapping())
    receive.mapping.close()
    send.mapping.close()
    with pytest.raises(ExternalDataClosed):
        rig.path.lend_receive(receive)
    with pytest.raises(ExternalDataClosed):
        rig.path.lend_send(send)
    assert not rig.memory_in_use()
    assert rig.path.section(receive.lease) is None


def test_a_mapping_that_ends_while_it_is_lent_stays_until_it_is_taken_back(rig: Rig) -> None:
    """GPADLs are torn down by the guest at any moment: also between the look and the use."""
    mapping = rig.mapping()
    events: list[str] = []

    def use(segs: bytes) -> None:
        ending = threading.Thread(target=mapping.close)
        ending.start()
        ending.join()  # does not wait for us
        with pytest.raises(ExternalDataClosed):
            mapping.read(0, 1)
        assert rig.memory_in_use()
        events.append("used")

    def taken_back() -> None:
        assert rig.memory_in_use()
        events.append("taken back")

    mapping.lend(use, taken_back)
    assert events == ["used", "taken back"]
    assert not rig.memory_in_use()


def test_a_mapping_that_ends_is_valid_until_it_is_taken_back(rig: Rig) -> None:
    mapping = rig.mapping()
    in_use: list[bool] = []
    mapping.lend(lambda segs: None, lambda: in_use.append(rig.memory_in_use()))
    assert rig.memory_in_use()
    mapping.close()
    mapping.close()
    assert in_use == [True]
    assert not rig.memory_in_use()
