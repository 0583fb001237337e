# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of what was lent to C: the callback of whoever lent it, which may raise anything."""

import logging
from collections.abc import Callable

log = logging.getLogger(__name__)


def give_back(before_close: Callable[[], None]) -> None:
    """Calls ``before_close``, which returns when what was lent is used no more; never raises.

    Whoever ends external data is not who lent it, and others' packets end with this one.
    """
    try:
        before_close()
    except BaseException:
        log.exception("giving back external data failed")
