# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that makes back ends, for all tests here."""

from collections.abc import Iterator

import pytest

from tests.liveness.process import Nursery


@pytest.fixture(scope="package")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()
