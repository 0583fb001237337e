# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of a back end, bounded: a guest can provoke messages as fast as it likes, and the log
must not grow with them. Applies to everything that is logged, whoever logs it.
"""

import logging
import time

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RateLimit(logging.Filter):
    """Lets ``burst`` records of a kind through in ``period`` seconds and counts what it holds back.

    Records are of one kind if they come from the same line of code. The first record of a new
    period says how many were held back in the one before.
    """

    def __init__(self, burst: int = 20, period: float = 10.0) -> None:
        super().__init__()
        self.burst = burst
        self.period = period
        self._kinds: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether the record is to be written."""
        kind = record.pathname, record.lineno
        now = time.monotonic()
        start, count = self._kinds.get(kind, (now, 0))
        if now - start >= self.period:
            if count > self.burst:
                record.msg = f"{record.getMessage()} ({count - self.burst} like this held back)"
                record.args = None
            start, count = now, 0
        self._kinds[kind] = start, count + 1
        return count < self.burst


def set_up(verbose: bool) -> None:
    """Logs to stderr, warnings and worse or, if ``verbose``, everything of interest."""
    handler = logging.StreamHandler()
    handler.addFilter(RateLimit())
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format=FORMAT, handlers=[handler]
    )
