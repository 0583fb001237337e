# SPDX-License-Identifier: GPL-2.0-or-later
"""The mappings that the rings of one connection may use up.

Each run of pages of a ring that are not contiguous is a mapping of its own, and its data are mapped
twice. A process may have only so many (``vm.max_map_count``), which a guest would use up with a few
rings of scattered pages.
"""

import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final

from vhostvmbus.wire.errors import MappingLimit

_DEFAULT: Final = 65530
"""The kernel's own choice for ``vm.max_map_count``."""


def _limit() -> int:
    """Returns half of what the process may have: the other half is for all else."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text()) // 2
    except (OSError, ValueError):
        return _DEFAULT // 2


def count_runs(pfns: Sequence[int]) -> int:
    """Returns how many mappings a ring of these pages takes at most."""
    breaks = sum(after != before + 1 for before, after in pairwise(pfns))
    return 2 * (breaks + 2)


class MappingBudget:
    """A bound on the mappings of a connection's rings. Thread-safe."""

    def __init__(self) -> None:
        self.limit = _limit()
        self._lock = threading.RLock()  # the collector may give back amid a take
        self._taken = 0

    def take(self, count: int) -> "MappingShare":
        """Takes ``count`` mappings. Raises :exc:`MappingLimit`."""
        with self._lock:
            if self._taken + count > self.limit:
                raise MappingLimit(
                    f"a ring in {count} pieces: all rings together may have {self.limit},"
                    f" and have {self._taken}"
                )
            self._taken += count
        return MappingShare(self, count)

    def put(self, count: int) -> None:
        """Puts mappings back."""
        with self._lock:
            self._taken -= count


class MappingShare:
    """The mappings that one ring has taken."""

    def __init__(self, budget: MappingBudget, count: int) -> None:
        self._budget = budget
        self._count = count

    def give_back(self) -> None:
        """Gives them back, once; whoever forgets to does so with the last reference."""
        count, self._count = self._count, 0
        if count:
            self._budget.put(count)

    __del__ = give_back
