# SPDX-License-Identifier: GPL-2.0-or-later
"""The server's tests leave no descriptor and no thread behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.vhost_user_server import Running, running
from tests.support.waiting import nothing_left_behind


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Running]:
    """A vhost-user server that listens, with a back end that writes down its calls."""
    with running(tmp_path / "sock") as run:
        yield run


@pytest.fixture(autouse=True)
def _servers_leave_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.path.name.startswith("test_server_"):
        yield
        return
    with nothing_left_behind():
        yield
