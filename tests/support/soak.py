# SPDX-License-Identifier: GPL-2.0-or-later
"""How often the repeating tests repeat: a few times, or with ``make soak`` (``VHOSTVMBUS_SOAK=1``)
many times. The few show that it works; only many find what happens once in a hundred times."""

import os

SOAK = os.environ.get("VHOSTVMBUS_SOAK") == "1"


def times(few: int, many: int) -> int:
    """Returns ``few``, or ``many`` with ``make soak``."""
    return many if SOAK else few


def examples(few: int) -> int:
    """Returns how many examples a property test tries that needs more or fewer than others do:
    ``few``, or ten times as many with ``make soak``."""
    return times(few, 10 * few)
