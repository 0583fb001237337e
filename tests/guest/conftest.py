# SPDX-License-Identifier: GPL-2.0-or-later
"""The software guest's own tests leave no descriptor and no thread behind."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Iterator

import pytest
from net_card_support import SocketLink


def _open_fds() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):
                found[name] = target
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The network card does its work in Python and in C: every test of it runs with both."""
    if metafunc.module.__name__.startswith("test_guest_net"):
        metafunc.fixturenames.insert(0, "link_is_direct")  # before a rig is made
        metafunc.parametrize(
            "link_is_direct", [False, True], indirect=True, ids=["python", "native"]
        )


@pytest.fixture
def link_is_direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the tests' link lets the card read and write its descriptors."""
    monkeypatch.setattr(SocketLink, "direct", request.param)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.path.name.startswith("test_guest_"):
        yield
        return
    gc.collect()
    fds, threads = _open_fds(), set(threading.enumerate())
    yield
    deadline = time.monotonic() + 5
    while _open_fds() != fds or set(threading.enumerate()) - threads:
        if time.monotonic() > deadline:
            break
        gc.collect()
        time.sleep(0.01)
    assert _open_fds() == fds
    assert not set(threading.enumerate()) - threads
