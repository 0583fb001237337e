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


def _open_fds() -> dict[str, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("/proc/"):
                found[name] = target
    return found


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
