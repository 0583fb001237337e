# SPDX-License-Identifier: GPL-2.0-or-later
"""The log stays small however often a guest provokes a message."""

import logging

import pytest

from vhostvmbus.cli.log import RateLimit


def make(limit: RateLimit) -> tuple[logging.Logger, list[str]]:
    lines: list[str] = []

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.Logger("test")
    handler = Lines()
    handler.addFilter(limit)
    logger.addHandler(handler)
    return logger, lines


def test_a_flood_is_cut_and_others_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("vhostvmbus.cli.log.time.monotonic", lambda: now)
    logger, lines = make(RateLimit(burst=3, period=10))
    for round_ in range(2):
        for number in range(1000):
            logger.warning("flood %d", number)
        logger.warning("another %d", round_)
        now += 10
    assert lines == [
        "flood 0",
        "flood 1",
        "flood 2",
        "another 0",
        "flood 0 (997 like this held back)",
        "flood 1",
        "flood 2",
        "another 1",
    ]
