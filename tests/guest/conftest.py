# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest's own tests leave no descriptor and no thread behind; the SCSI controller's
run with the ring engine's plan and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from net_card_support import SocketLink
from waiting_support import nothing_left_behind

from vhostvmbus.devices.scsi import ScsiController


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The network card does its work in Python and in C: every test of it runs with both."""
    if metafunc.module.__name__.startswith("test_guest_net"):
        metafunc.parametrize(
            "_link_is_direct", [False, True], indirect=True, ids=["python", "native"]
        )


@pytest.fixture(autouse=True)
def _link_is_direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the tests' link lets the card read and write its descriptors."""
    monkeypatch.setattr(SocketLink, "direct", getattr(request, "param", True))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.path.name.startswith("test_guest_"):
        yield
        return
    with nothing_left_behind():
        yield


@pytest.fixture(params=[True, False], ids=["plan", "python"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the controller gives the ring engine a plan: no difference may be seen."""
    wanted = bool(request.param)
    monkeypatch.setattr(ScsiController, "plans", wanted)
    return wanted
