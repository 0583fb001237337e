# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest's own tests leave no descriptor and no thread behind; the SCSI controller's
run with the ring engine's plan and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from waiting_support import nothing_left_behind

from vhostvmbus.devices.scsi import ScsiController


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
