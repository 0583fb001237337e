# SPDX-License-Identifier: GPL-2.0-or-later
"""Fixtures that several files of unit tests use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from core_support import Ram
from net_support import private_network
from vhost_user_server_support import Running, running
from waiting_support import nothing_left_behind

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


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Running]:
    """A vhost-user server that listens, with a back end that writes down its calls."""
    with running(tmp_path / "sock") as run:
        yield run


@pytest.fixture(autouse=True)
def _servers_leave_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.path.name.startswith("test_vhost_user_server_"):
        yield
        return
    with nothing_left_behind():
        yield
