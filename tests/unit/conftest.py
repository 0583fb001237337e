# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that several files of unit tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.network import private_network
from tests.support.ram import Ram
from vhostvmbus.memory import GuestMemory


@pytest.fixture
def ram() -> Iterator[Ram]:
    ram = Ram()
    yield ram
    ram.close()


@pytest.fixture
def memory(ram: Ram) -> Iterator[GuestMemory]:
    """A memory map with :func:`ram` in it."""
    memory = ram.memory()
    yield memory
    memory.close()


@pytest.fixture
def network() -> Iterator[None]:
    """The test and its threads are in a network namespace without a name."""
    with private_network():
        yield
