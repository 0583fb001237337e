# SPDX-License-Identifier: GPL-2.0-or-later
"""The SCSI controller's tests run with the ring engine's plan and without."""

from __future__ import annotations

import pytest

from vhostvmbus.devices.scsi import ScsiController


@pytest.fixture(params=[True, False], ids=["plan", "python"])
def plans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the controller gives the ring engine a plan: no difference may be seen."""
    wanted = bool(request.param)
    monkeypatch.setattr(ScsiController, "plans", wanted)
    return wanted
