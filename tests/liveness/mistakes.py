# SPDX-License-Identifier: GPL-2.0-or-later
"""Mistakes that a back end could have, to see that the harness finds them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from vhostvmbus.channel import Channel
from vhostvmbus.device import DeviceHost
from vhostvmbus.memory import ExternalData


def _before(owner: Any, name: str, first: Callable[[], object]) -> None:
    """Has ``first`` called before the method ``name`` of ``owner``."""
    real = getattr(owner, name)

    def method(self: Any, *args: Any, **options: Any) -> Any:
        first()
        return real(self, *args, **options)

    setattr(owner, name, method)


def late() -> None:
    """Closes channels slowly, by the clock of the process."""

    def wait() -> None:
        for _ in range(60):
            time.sleep(0.005)

    _before(DeviceHost, "close_channel", wait)


def loose() -> None:
    """Leaves a packet's memory to whoever has it, after its channel has ended."""

    def enter(self: Any, *_: object) -> Any:
        with self._lock:
            self._busy += 1
            return self._written

    ExternalData._enter = enter  # type: ignore[method-assign]
    ExternalData.close = lambda *_, **__: None  # type: ignore[method-assign,assignment]


def frail() -> None:
    """Ends the server by what a channel raises."""

    def raises() -> None:
        raise RuntimeError("nobody takes this")

    _before(DeviceHost, "modify_channel", raises)


def deaf() -> None:
    """Ends every channel with one that is closed."""
    real = DeviceHost.close_channel

    def close_channel(self: DeviceHost, index: int) -> None:
        for channel in self.channels.values():
            channel._life.stopping = True
            channel._life.wake()
        real(self, index)

    DeviceHost.close_channel = close_channel  # type: ignore[method-assign]


def leaky() -> None:
    """Keeps a descriptor of each channel."""
    _before(Channel, "begin", lambda: os.dup(0))


def busy() -> None:
    """Keeps a thread of each channel."""
    _before(
        Channel,
        "begin",
        lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    )


MISTAKES = {function.__name__: function for function in (late, loose, frail, deaf, leaky, busy)}
"""What a back end can be made with, by its name."""
