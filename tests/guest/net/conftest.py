# SPDX-License-Identifier: GPL-2.0-or-later
"""No test of the network card leaves a descriptor or a thread behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.waiting import nothing_left_behind


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    with nothing_left_behind():
        yield
