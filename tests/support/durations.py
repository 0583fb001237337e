# SPDX-License-Identifier: GPL-2.0-or-later
"""Which tests took how long: the slowest ones, and the sum for each folder."""

from collections import defaultdict
from collections.abc import Iterable
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Protocol

SLOWEST = 20


class Report(Protocol):
    """A phase of a test: what pytest calls setup, call and teardown."""

    nodeid: str
    when: str
    duration: float


def table(reports: Iterable[Report]) -> list[str]:
    """Returns the lines that ``--times`` prints. A test's time is that of all its phases, so the
    first one that uses a shared fixture has that fixture's setup."""
    tests: dict[str, float] = defaultdict(float)
    setups: dict[str, float] = defaultdict(float)
    for report in reports:
        tests[report.nodeid] += report.duration
        if report.when == "setup":
            setups[report.nodeid] += report.duration
    folders: dict[str, list[float]] = defaultdict(list)
    for nodeid, seconds in tests.items():
        folder = str(PurePosixPath(nodeid.partition("::")[0]).parent)
        folders[folder.removeprefix("tests/")].append(seconds)
    lines = [f"the slowest {min(SLOWEST, len(tests))}:"]
    for nodeid, seconds in sorted(tests.items(), key=itemgetter(1), reverse=True)[:SLOWEST]:
        setup = f" ({setups[nodeid]:.0f} s to set up)" if setups[nodeid] >= 1 else ""
        lines.append(f"{seconds:7.1f} s {nodeid.removeprefix('tests/')}{setup}")
    lines.append("each folder:")
    for folder, all_seconds in sorted(folders.items()):
        lines.append(f"{folder:<24} {sum(all_seconds):5.0f} s in {len(all_seconds)} tests")
    return lines
