# SPDX-License-Identifier: GPL-2.0-or-later
"""What several of this room's tests share."""

from collections.abc import Iterator

import pytest

from tests.support.inflight_rig import Rig


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()
