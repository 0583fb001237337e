# SPDX-License-Identifier: GPL-2.0-or-later
"""The network card does its work in Python and in C: every test of it runs with both, and leaves no
descriptor and no thread behind. ``test_alike.py`` holds the two ways together by itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.net_card import SocketLink
from tests.support.waiting import nothing_left_behind

BOTH_BY_ITSELF = "test_alike"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if not metafunc.module.__name__.endswith(BOTH_BY_ITSELF):
        metafunc.parametrize(
            "_link_is_direct", [False, True], indirect=True, ids=["python", "native"]
        )


@pytest.fixture(autouse=True)
def _link_is_direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the tests' link lets the card read and write its descriptors."""
    monkeypatch.setattr(SocketLink, "direct", getattr(request, "param", True))


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.stem == BOTH_BY_ITSELF:
        yield
        return
    with nothing_left_behind():
        yield
