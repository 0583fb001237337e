# SPDX-License-Identifier: GPL-2.0-or-later
"""Property tests try the same examples each time, so that a change is judged by what it changed;
``make soak`` (``VHOSTVMBUS_SOAK=1``) looks for new ones.

Tests send SIGINT to programs. A shell starts background jobs with SIGINT ignored, and so would be
all that they start; with a handler here it is not.

What a thread raises and nobody takes fails the test, unless it has virtual machines: there it is
a warning, since what is on its way when a machine ends may well break.

``--times`` ends with the slowest tests, and how long the tests of each folder took. ``make soak``
ends with the figures of those that repeat something and look whether a process grows.
"""

import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support import durations
from tests.support.footprint import Repeated, Subject, repeat
from tests.support.soak import SOAK

MACHINES = Path(__file__).parent / "vm"

settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.register_profile("new", max_examples=1000, deadline=None)
settings.load_profile("new" if SOAK else "same")
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
    for item in items:
        if MACHINES not in item.path.parents:
            item.add_marker(mark)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--times", action="store_true", help="which tests took how long")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = itertools.chain.from_iterable(terminalreporter.stats.values())
    reports = [report for report in found if isinstance(report, pytest.TestReport)]
    if terminalreporter.config.getoption("times"):
        terminalreporter.section("times")
        terminalreporter.write("\n".join([*durations.table(reports), ""]))
    if SOAK:
        terminalreporter.section("figures")
        for report in reports:
            if report.when == "call":
                for name, value in report.user_properties:
                    terminalreporter.write(f"{name}: {value}\n")


@pytest.fixture
def repeated(record_property: Callable[[str, object], None]) -> Repeated:
    """Counts turns of something, and fails if a process grows by it: ``what``, how many turns, and
    the processes, as :func:`tests.support.footprint.repeat` wants them."""

    def count(what: str, turns: int, *subjects: Subject) -> Iterator[int]:
        return repeat(what, turns, subjects, lambda figures: record_property(what, figures))

    return count
