# SPDX-License-Identifier: GPL-2.0-or-later
"""The seconds that a back end waits for anything, made shorter all alike.

The specification gives a request ten seconds. A harness that waited that long for each device that
blocks would try little; so it divides what the back end waits, and what it has for its answers, by
the same number. Each place is named here, and one that is not there any more is an error.
"""

from __future__ import annotations

import importlib

PLACES = (
    ("vhostvmbus.channel.channel", "COUNT_SECONDS"),
    ("vhostvmbus.device.host", "CLOSING_SECONDS"),
    ("vhostvmbus.device.host", "GRACE"),
    ("vhostvmbus.device.host", "HURRY_SECONDS"),
    ("vhostvmbus.device.host", "LAST_PATIENCE"),
    ("vhostvmbus.device.host", "PATIENCE"),
    ("vhostvmbus.device.host", "REQUEST_SECONDS"),
    ("vhostvmbus.device.handler", "STATS_SECONDS"),
    ("vhostvmbus.device.stillness", "SUSPEND_SECONDS"),
    ("vhostvmbus.device.stillness", "CALLBACK_SECONDS"),
    ("vhostvmbus.device.loop", "CANCEL_SECONDS"),
    ("vhostvmbus.vhost_user.connection", "SEND_TIMEOUT"),
)
"""The modules' constants, each where it is looked at."""


GIVEN = {("vhostvmbus.vhost_user.connection", "ANSWER_TIMEOUT")}
"""Those that the server is given instead."""


def shorten(factor: float) -> None:
    """Multiplies every patience of the back end in this process by ``factor``."""
    for module in {module for module, _ in PLACES}:
        for name, value in vars(importlib.import_module(module)).items():
            patience = name.isupper() and isinstance(value, float)
            if patience and (module, name) not in {*PLACES, *GIVEN}:
                raise LookupError(f"{module}.{name} is a patience that is named nowhere")
    for module, name in PLACES:
        place = importlib.import_module(module)
        setattr(place, name, getattr(place, name) * factor)
